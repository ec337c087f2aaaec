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

// This file says why a mint gave no token: what kind of trouble it was, whom it
// concerns, whether trying again may help, and how it is told.

// errorClass says what kind of trouble a mint had. The classes are few and
// fixed: they are label values in metrics and keys in status.
type errorClass string

const (
	// classClientRefused: MojoAuth refused the client, or the endpoint is not
	// one. Concerns the whole config.
	classClientRefused errorClass = "client_refused"
	// classRequestRefused: MojoAuth accepted the client but not what it asked
	// for. Concerns one role, or one caller's scopes.
	classRequestRefused errorClass = "request_refused"
	// classThrottled: HTTP 429. No mint ends with it: its request goes back to its
	// place at the gate.
	classThrottled errorClass = "throttled"
	// classServerError: HTTP 5xx, or an OAuth error that says the same.
	classServerError errorClass = "server_error"
	// classUnexpected: an answer that is no answer of a token endpoint.
	classUnexpected errorClass = "unexpected_answer"
	// classExpiredOnArrival: a token that may not be served any more when it
	// arrives. Concerns one role, or one caller's scopes.
	classExpiredOnArrival errorClass = "expired_on_arrival"
	// classTLS: the endpoint's certificate or TLS was not acceptable.
	classTLS errorClass = "tls"
	// classNetwork: no connection, or one that broke.
	classNetwork errorClass = "network"
	// classTimeout: no answer within request_timeout.
	classTimeout errorClass = "timeout"
	// classInternal: the engine could not make a request. Concerns the whole config.
	classInternal errorClass = "internal"
	// classNothingNewer: a token that expires no later than the cached one. The mint
	// counts as one that succeeded; only its key is backed off.
	classNothingNewer errorClass = "nothing_newer"
)

// mintError is why a token could not be had. It holds nothing of the answer
// but its status and what passed a redactor, so that it may be logged and shown.
type mintError struct {
	class       errorClass
	status      int    // HTTP status, 0 when there was no answer
	oauthError  string // RFC 6749 error code, "" when there was none
	description string // by MojoAuth, fit to be shown
	reason      string // by this engine: what was wrong, when status and error do not say it

	retryAfter time.Duration // asked for by Retry-After, 0 when it was not
	allowed    time.Duration // for classTimeout: the time that was allowed
}

// Error says what happened, without a config's or role's name.
func (e *mintError) Error() string {
	var what string
	switch e.class {
	case classClientRefused:
		what = "MojoAuth refused the client"
	case classRequestRefused:
		what = "MojoAuth refused the request"
	case classThrottled:
		what = "MojoAuth throttles"
	case classServerError:
		what = "MojoAuth failed"
	case classUnexpected:
		what = "the token endpoint gave an answer that holds no token"
	case classExpiredOnArrival:
		what = "the token from MojoAuth had expired, or nearly, when it arrived"
	case classTLS:
		what = "no trusted TLS connection to the token endpoint"
	case classNetwork:
		what = "the token endpoint could not be reached"
	case classInternal:
		what = "no request could be made"
	case classNothingNewer:
		what = "MojoAuth gave no token that lasts longer"
	case classTimeout:
		return fmt.Sprintf("the token endpoint gave no answer within the %s that request_timeout allows", e.allowed)
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

// remedy says what whoever manages the config can do about it: the beginning of
// a sentence.
func (e *mintError) remedy() string {
	switch {
	case e.class == classExpiredOnArrival:
		return "Check max_ttl of the role, how long the token endpoint takes, and the clocks of this host and MojoAuth"
	case e.status == http.StatusNotFound, e.class == classUnexpected:
		return "Check token_url"
	case e.class == classClientRefused:
		return "Check client_id, client_secret and token_endpoint_auth_method"
	case e.class == classRequestRefused:
		return "Check what the application may ask for in MojoAuth"
	case e.class == classTLS:
		return "Check token_url and ca_cert"
	case e.class == classNetwork, e.class == classTimeout:
		return "Check token_url and the network"
	default:
		return "Try again later"
	}
}

// refused reports whether MojoAuth understood and said no. The caller, or whoever
// configured the role, can mend that; everything else is an upstream fault.
func (e *mintError) refused() bool {
	return e.class == classClientRefused || e.class == classRequestRefused
}

// concernsRequest reports whether only this request failed, so that others under
// the same config may well succeed.
func (e *mintError) concernsRequest() bool {
	return e.class == classRequestRefused || e.class == classExpiredOnArrival
}

// acceptsClient reports whether the error shows that the credentials are good: it
// is about scope, audience or the like.
func (e *mintError) acceptsClient() bool {
	return e.class == classRequestRefused && oauthErrorClass[e.oauthError] == classRequestRefused
}

// retryable reports whether the same request may succeed within moments.
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

// throttled reports whether MojoAuth wants to be asked more slowly, which says
// nothing of the request.
func (e *mintError) throttled() bool { return e.class == classThrottled }

// answer is what a try that ended so, without an error if e is nil, says of the pace
// of requests.
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
	default: // a refusal concerns one request, whatever it asks for
		return gate.Answered, 0
	}
}

// withoutDescription is the error as it is told to readers of other roles than
// the one whose request failed: MojoAuth's own words may name what that role asks
// for. So may an error code of its own making.
func (e *mintError) withoutDescription() *mintError {
	told := *e
	told.description = ""
	if !isErrorCode(told.oauthError) {
		told.oauthError = ""
	}
	return &told
}

// isErrorCode reports whether text looks like an error code, as those of RFC 6749
// and of IANA's registry of OAuth Extensions Errors do: no sentence, no URL.
func isErrorCode(text string) bool {
	return len(text) <= 64 && !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
	})
}

// noConnection makes a mintError of a failure to get any answer, in words of the
// engine's own: what Go says may hold the URL, or texts that the server chose, such
// as the names in its certificate.
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

// tlsTrouble says what is wrong with TLS, "" when it is something else.
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
		return "its certificate is signed by an authority that is not trusted here; set ca_cert if it is your own"
	case errors.As(err, &hostname):
		return "its certificate is for another host than token_url names"
	case errors.As(err, &invalid):
		return "its certificate is not valid: " + invalidCertificate(invalid.Reason)
	case errors.As(err, &verification):
		return "its certificate could not be verified"
	case errors.As(err, &recordHeader) && string(recordHeader.RecordHeader[:]) == "HTTP/":
		return "the endpoint speaks plain HTTP on that port, not TLS"
	case errors.As(err, &recordHeader):
		return "the endpoint does not speak TLS"
	case errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"):
		// crypto/tls reports an alert so, in either direction. Its text is one of a
		// table of Go's.
		return "the handshake failed: " + rootCause(op).Error()
	case strings.HasPrefix(rootCause(err).Error(), "tls: "):
		return "the handshake failed"
	}
	return ""
}

// invalidCertificate tells a reason without the detail that comes with it, in which
// names of the certificate are quoted.
func invalidCertificate(reason x509.InvalidReason) string {
	switch reason {
	case x509.Expired:
		return "it has expired, or is not valid yet by the clock of this host"
	case x509.IncompatibleUsage, x509.CANotAuthorizedForExtKeyUsage:
		return "it was not issued for servers"
	case x509.NotAuthorizedToSign, x509.TooManyIntermediates, x509.CANotAuthorizedForThisName, x509.NameMismatch:
		return "an authority in its chain was not allowed to issue it"
	default:
		return "its chain does not add up"
	}
}

// networkTrouble says why there is no connection, or none any more.
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
		return "the connection broke before the answer was whole"
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
