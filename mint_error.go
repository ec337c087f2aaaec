// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file describes why a mint failed: the class of the failure, whom it concerns,
// whether a retry may help, and its text.

// errorClass is the class of a mint's failure. The classes are few and fixed: they are
// label values in metrics and keys in status.
type errorClass string

const (
	// classClientRefused: MojoAuth refused the client, or token_url is not a token
	// endpoint. Concerns the entire config.
	classClientRefused errorClass = "client_refused"
	// classRequestRefused: MojoAuth accepted the client but refused this request.
	// Concerns one role or one scope subset.
	classRequestRefused errorClass = "request_refused"
	// classThrottled: HTTP 429. No mint fails with it: its request goes back to its
	// place at the gate.
	classThrottled errorClass = "throttled"
	// classServerError: HTTP 5xx, or an OAuth error that means the same.
	classServerError errorClass = "server_error"
	// classUnexpected: a response that no token endpoint sends.
	classUnexpected errorClass = "unexpected_answer"
	// classExpiredOnArrival: a token that was at or below its floor on arrival. Concerns
	// one role or one scope subset.
	classExpiredOnArrival errorClass = "expired_on_arrival"
	// classTLS: the endpoint's certificate is not trusted, or TLS failed.
	classTLS errorClass = "tls"
	// classNetwork: no connection, or a broken one.
	classNetwork errorClass = "network"
	// classTimeout: no response within request_timeout.
	classTimeout errorClass = "timeout"
	// classInternal: the engine could not make a request. Concerns the entire config.
	classInternal errorClass = "internal"
	// classNothingNewer: a token that expires no later than the cached one. The mint
	// counts as a success; only its key backs off.
	classNothingNewer errorClass = "nothing_newer"
)

// mintError is why a mint failed. Of the response, it has only the status and what passed
// the redactor, so it is safe to log and show.
type mintError struct {
	class       errorClass
	status      int    // HTTP status, 0 if there was no response
	oauthError  string // RFC 6749 error code, "" if there was none
	description string // by MojoAuth, redacted
	reason      string // by this engine, if status and error code do not say what is wrong

	retryAfter time.Duration // from Retry-After, 0 if there was none
	allowed    time.Duration // for classTimeout: the time limit
}

// Error says what happened, without the name of the config or role.
func (e *mintError) Error() string {
	var what string
	switch e.class {
	case classClientRefused:
		what = "MojoAuth refused the client"
	case classRequestRefused:
		what = "MojoAuth refused the request"
	case classThrottled:
		what = "MojoAuth is throttling"
	case classServerError:
		what = "MojoAuth failed"
	case classUnexpected:
		what = "the token endpoint returned no usable token"
	case classExpiredOnArrival:
		what = "the token from MojoAuth had expired, or almost expired, on arrival"
	case classTLS:
		what = "no trusted TLS connection to the token endpoint"
	case classNetwork:
		what = "the token endpoint could not be reached"
	case classInternal:
		what = "the token request could not be made"
	case classNothingNewer:
		what = "MojoAuth returned no token that expires later"
	case classTimeout:
		return fmt.Sprintf("the token endpoint did not answer within the request_timeout of %s", e.allowed)
	}
	for _, detail := range []string{e.oauthError, e.description, e.reason} {
		if detail != "" {
			what += ": " + detail
		}
	}
	if e.status != 0 {
		what += fmt.Sprintf(" (HTTP %d)", e.status)
	}
	return what
}

// remedy says what an operator can do about the failure. The result is a clause without a
// period.
func (e *mintError) remedy() string {
	switch {
	case e.class == classExpiredOnArrival:
		return "Check the role's max_ttl, the response time of the token endpoint, and the clocks of this host and MojoAuth"
	case e.status == http.StatusNotFound, e.class == classUnexpected:
		return "Check token_url"
	case e.class == classClientRefused:
		return "Check client_id, client_secret and token_endpoint_auth_method"
	case e.class == classRequestRefused:
		return "Check which audience and scopes the application may request in MojoAuth"
	case e.class == classTLS:
		return "Check token_url and ca_cert"
	case e.class == classNetwork, e.class == classTimeout:
		return "Check token_url and the network"
	default:
		return "Try again later"
	}
}

// refused reports whether MojoAuth understood the request and refused it. The caller or the
// operator can fix that. Everything else is a fault of the endpoint or the network.
func (e *mintError) refused() bool {
	return e.class == classClientRefused || e.class == classRequestRefused
}

// concernsRequest reports whether the failure concerns only this request, so others with
// the same config may succeed.
func (e *mintError) concernsRequest() bool {
	return e.class == classRequestRefused || e.class == classExpiredOnArrival
}

// acceptsClient reports whether the error shows that the credentials are good, because it
// concerns the scope, the audience, or the like.
func (e *mintError) acceptsClient() bool {
	return e.class == classRequestRefused && oauthErrorClass[e.oauthError] == classRequestRefused
}

// retryable reports whether the same request may succeed moments later.
func (e *mintError) retryable() bool {
	switch e.class {
	case classNetwork:
		return true
	case classServerError:
		switch e.status {
		case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
	}
	return false
}

// throttled reports whether MojoAuth refused the request only because of the pace.
func (e *mintError) throttled() bool { return e.class == classThrottled }

// answer returns what a request that ended with e means for the pace. e is nil for a
// request that succeeded.
func (e *mintError) answer() (how gate.Answer, retryAfter time.Duration) {
	switch {
	case e == nil:
		return gate.Answered, 0
	case e.throttled():
		return gate.Throttled, e.retryAfter
	case e.status == 0:
		return gate.NoAnswer, 0
	case e.status >= http.StatusInternalServerError:
		return gate.Answered, e.retryAfter
	default: // a refusal concerns one request, so its Retry-After does not count
		return gate.Answered, 0
	}
}

// withoutDescription returns the error for readers of other roles than the one whose
// request failed. MojoAuth's description, or an error code of its own, may reveal what
// that role requests.
func (e *mintError) withoutDescription() *mintError {
	shown := *e
	shown.description = ""
	if !isErrorCode(shown.oauthError) {
		shown.oauthError = ""
	}
	return &shown
}

// isErrorCode reports whether text looks like an error code of RFC 6749 or of IANA's
// registry of OAuth Extensions Errors, and not like a sentence or a URL.
func isErrorCode(text string) bool {
	return len(text) <= 64 && !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
	})
}

// noConnection returns a mintError for a request without a response. It uses the engine's
// own words, because Go's may contain the URL, or texts that the server chose, such as the
// names in its certificate.
func noConnection(err error) *mintError {
	var failed *mintError
	if errors.As(err, &failed) {
		return failed
	}
	if reason := tlsTrouble(err); reason != "" {
		return &mintError{class: classTLS, reason: reason}
	}
	return &mintError{class: classNetwork, reason: networkTrouble(err)}
}

// tlsTrouble says what is wrong with TLS. It returns "" for other errors.
func tlsTrouble(err error) string {
	var (
		unknownAuthority x509.UnknownAuthorityError
		hostname         x509.HostnameError
		invalid          x509.CertificateInvalidError
		verification     *tls.CertificateVerificationError
		recordHeader     tls.RecordHeaderError
		op               *net.OpError
	)
	switch {
	case errors.As(err, &unknownAuthority):
		return "its certificate is signed by an authority that this host does not trust; if it is your own authority, set ca_cert"
	case errors.As(err, &hostname):
		return "its certificate is for a different host than token_url names"
	case errors.As(err, &invalid):
		return "its certificate is not valid: " + invalidCertificate(invalid.Reason)
	case errors.As(err, &verification):
		return "its certificate could not be verified"
	case errors.As(err, &recordHeader) && string(recordHeader.RecordHeader[:]) == "HTTP/":
		return "the endpoint speaks plain HTTP on this port, not TLS"
	case errors.As(err, &recordHeader):
		return "the endpoint does not speak TLS"
	case errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"):
		// This is how crypto/tls reports an alert, in either direction. Its text comes
		// from a table in Go.
		return "the handshake failed: " + rootCause(op).Error()
	case strings.HasPrefix(rootCause(err).Error(), "tls: "):
		return "the handshake failed"
	}
	return ""
}

// invalidCertificate describes the reason without Go's details, which quote names from the
// certificate.
func invalidCertificate(reason x509.InvalidReason) string {
	switch reason {
	case x509.Expired:
		return "it has expired or is not valid yet, according to the clock of this host"
	case x509.IncompatibleUsage, x509.CANotAuthorizedForExtKeyUsage:
		return "it was not issued for a server"
	case x509.NotAuthorizedToSign, x509.TooManyIntermediates, x509.CANotAuthorizedForThisName, x509.NameMismatch:
		return "an authority in its chain may not issue it"
	default:
		return "its chain is not valid"
	}
}

// networkTrouble says why there is no connection, or why it broke.
func networkTrouble(err error) string {
	var (
		dns   *net.DNSError
		op    *net.OpError
		errno syscall.Errno
	)
	switch {
	case errors.As(err, &dns):
		return "its host name does not resolve"
	case errors.As(err, &op) && errors.As(op, &errno):
		return op.Op + ": " + errno.Error()
	case errors.As(err, &op) && op.Timeout():
		return op.Op + ": no answer in time"
	default:
		return "the connection broke before the response was complete"
	}
}

func rootCause(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
