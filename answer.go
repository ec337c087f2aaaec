// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// This file says what an answer of the token endpoint means: pure functions
// from what came back to a token or to a mintError.

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
	// classThrottled: HTTP 429.
	classThrottled errorClass = "throttled"
	// classServerError: HTTP 5xx, or an OAuth error that says the same.
	classServerError errorClass = "server_error"
	// classUnexpected: an answer that is no answer of a token endpoint.
	classUnexpected errorClass = "unexpected_answer"
	// classTLS: the endpoint's certificate or TLS was not acceptable.
	classTLS errorClass = "tls"
	// classNetwork: no connection, or one that broke.
	classNetwork errorClass = "network"
	// classTimeout: no answer within request_timeout.
	classTimeout errorClass = "timeout"
)

// OAuth errors of a token endpoint: RFC 6749 §5.2, RFC 8707 §2, and those of
// §4.1.2.1 that servers send here too. They decide before the HTTP status.
var oauthErrorClass = map[string]errorClass{
	"invalid_client":          classClientRefused,
	"unauthorized_client":     classClientRefused,
	"invalid_scope":           classRequestRefused,
	"invalid_target":          classRequestRefused,
	"invalid_request":         classRequestRefused,
	"access_denied":           classRequestRefused,
	"server_error":            classServerError,
	"temporarily_unavailable": classServerError,
}

// mintError is why a token could not be had. It holds nothing of the answer
// but its status and what passed a redactor, so that it may be logged and shown.
type mintError struct {
	class       errorClass
	status      int    // HTTP status, 0 when there was no answer
	oauthError  string // RFC 6749 error code, "" when there was none
	description string // by MojoAuth, cut and redacted
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
	case classTLS:
		what = "no trusted TLS connection to the token endpoint"
	case classNetwork:
		what = "the token endpoint could not be reached"
	case classExpiredOnArrival:
		what = "the token had expired when it arrived"
	case classNothingNewer:
		what = "MojoAuth gave no token that lasts longer"
	case classInternal:
		what = "no request could be made"
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
		return "Check max_ttl of the role and how long the token endpoint takes"
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

// refused tells whether MojoAuth understood and said no. The caller, or whoever
// configured the role, can mend that; everything else is an upstream fault.
func (e *mintError) refused() bool {
	return e.class == classClientRefused || e.class == classRequestRefused
}

// concernsRequest tells whether only this request failed, so that others under
// the same config may well succeed.
func (e *mintError) concernsRequest() bool {
	return e.class == classRequestRefused || e.class == classExpiredOnArrival
}

// acceptsClient tells whether the error shows that the credentials are good: it
// is about scope, audience or the like.
func (e *mintError) acceptsClient() bool {
	return e.class == classRequestRefused && oauthErrorClass[e.oauthError] == classRequestRefused
}

// retryable tells whether the same request may succeed within moments.
func (e *mintError) retryable() bool {
	switch e.class {
	case classNetwork, classThrottled:
		return true
	case classServerError:
		switch e.status {
		case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
	}
	return false
}

// answer is what came back from the token endpoint: all of it.
type answer struct {
	status     int
	header     http.Header
	body       []byte // up to maxAnswerBytes+1: one more says that it was longer
	receivedAt time.Time
}

// grantedToken is a successful answer in the shape of RFC 6749 §5.1.
type grantedToken struct {
	AccessToken string `json:"access_token"`
	TokenType   string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in,omitempty"` // seconds; absent when 0
	Scope       string `json:"scope,omitempty"`
}

func (g *grantedToken) json() []byte {
	body, err := json.Marshal(g)
	if err != nil {
		panic(err) // strings and a number: always possible
	}
	return body
}

// readAnswer makes a token or a mintError of an answer. sentAt is when the
// request was sent; an expires_in that is a point in time counts from there.
func readAnswer(a answer, sentAt time.Time, redact redactor) (*grantedToken, *mintError) {
	failed := &mintError{status: a.status, retryAfter: retryAfter(a.header, a.receivedAt)}
	ok := a.status >= 200 && a.status <= 299

	fields, reason := parseFields(a.body)
	if fields != nil {
		code := stringField(fields, "error")
		failed.oauthError = redact.clean(code)
		failed.description = redact.clean(describe(fields))
		if class, known := oauthErrorClass[code]; known {
			failed.class = class
			return nil, failed
		}
		if ok && code != "" { // a refusal under a status that says success
			failed.class = classRequestRefused
			return nil, failed
		}
	}

	switch {
	case ok:
	case a.status == http.StatusTooManyRequests:
		failed.class = classThrottled
		return nil, failed
	case a.status == http.StatusBadRequest:
		failed.class = classRequestRefused
		return nil, failed
	case a.status >= 400 && a.status <= 499:
		failed.class = classClientRefused
		return nil, failed
	case a.status >= 500:
		failed.class = classServerError
		return nil, failed
	case a.status >= 300 && a.status <= 399:
		failed.class = classUnexpected
		failed.reason = "it redirects, which is not followed because it would send the client secret elsewhere; set token_url to where the endpoint is"
		return nil, failed
	default:
		failed.class = classUnexpected
		return nil, failed
	}

	failed.class = classUnexpected
	if fields == nil {
		failed.reason = reason
		return nil, failed
	}
	g := &grantedToken{
		AccessToken: stringField(fields, "access_token"),
		TokenType:   stringField(fields, "token_type"),
		ExpiresIn:   expiresIn(fields["expires_in"], sentAt),
		Scope:       scopeField(fields["scope"]),
	}
	switch {
	case g.AccessToken == "":
		failed.reason = "the answer has no access_token"
		return nil, failed
	case strings.ContainsFunc(g.AccessToken, func(r rune) bool { return r < 0x20 || r > 0x7e }):
		// RFC 6749 appendix A.12. Such a token would break out of a header.
		failed.reason = "the access_token holds characters that no access token may have"
		return nil, failed
	}
	if g.TokenType == "" || strings.EqualFold(g.TokenType, "bearer") {
		g.TokenType = "Bearer"
	}
	return g, nil
}

// parseFields reads a body as a JSON object, under any content type. It is nil,
// with the reason, when it is none.
func parseFields(body []byte) (fields map[string]json.RawMessage, reason string) {
	switch {
	case len(body) > maxAnswerBytes:
		return nil, fmt.Sprintf("the answer is longer than %d KiB", maxAnswerBytes>>10)
	case json.Unmarshal(body, &fields) != nil || fields == nil:
		return nil, "the answer is no JSON object"
	}
	return fields, ""
}

// stringField is a field's value, "" when it is absent or no string.
func stringField(fields map[string]json.RawMessage, name string) string {
	var s string
	if json.Unmarshal(fields[name], &s) != nil {
		return ""
	}
	return s
}

// describe is what the answer says in words: RFC 6749's error_description, or
// MojoAuth's message and description. MojoAuth's numbers mean different things
// in different tables; they are shown, and decide nothing.
func describe(fields map[string]json.RawMessage) string {
	if d := stringField(fields, "error_description"); d != "" {
		return d
	}
	var parts []string
	for _, name := range []string{"message", "description"} {
		if s := stringField(fields, name); s != "" {
			parts = append(parts, s)
		}
	}
	for _, name := range []string{"error_code", "ErrorCode", "code"} {
		var number json.Number
		if json.Unmarshal(fields[name], &number) == nil && number != "" {
			parts = append(parts, "MojoAuth error "+number.String())
			break
		}
	}
	return strings.Join(parts, "; ")
}

// expiresIn reads a lifetime in whole seconds from any form seen in MojoAuth's
// APIs: a number, a number in a string, or an RFC 3339 time. 0 means that the
// field tells none: absent, null, unreadable, below a second, or past.
func expiresIn(raw json.RawMessage, sentAt time.Time) int64 {
	var value any
	if json.Unmarshal(raw, &value) != nil {
		return 0
	}
	var seconds float64
	switch v := value.(type) {
	case float64:
		seconds = v
	case string:
		v = strings.TrimSpace(v)
		if at, err := time.Parse(time.RFC3339, v); err == nil {
			seconds = at.Sub(sentAt).Seconds()
			break
		}
		parsed, err := strconv.ParseFloat(v, 64)
		if err != nil || math.IsNaN(parsed) {
			return 0
		}
		seconds = parsed
	}
	if seconds < 1 {
		return 0
	}
	return int64(min(seconds, longestLifetime.Seconds()))
}

// scopeField reads the granted scope: a string (RFC 6749 §3.3) or, tolerated, a
// list of strings.
func scopeField(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return strings.Join(strings.Fields(s), " ")
	}
	var list []string
	if json.Unmarshal(raw, &list) == nil {
		return strings.Join(list, " ")
	}
	return ""
}

// longestRetryAfter caps what Retry-After may ask for.
const longestRetryAfter = 10 * time.Minute

// retryAfter reads Retry-After (RFC 9110 §10.2.3), seconds or a date. 0 means
// that the server asks for no wait.
func retryAfter(header http.Header, now time.Time) time.Duration {
	value := strings.TrimSpace(header.Get("Retry-After"))
	var wait time.Duration
	if seconds, err := strconv.ParseUint(value, 10, 63); err == nil || errors.Is(err, strconv.ErrRange) {
		wait = time.Duration(min(seconds, uint64(longestRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		wait = at.Sub(now)
	}
	return min(max(wait, 0), longestRetryAfter)
}

// classifyTransport makes a mintError of a failure to get any answer. Only
// errors whose texts are known to repeat nothing that the server sent, and no
// URL, are quoted.
func classifyTransport(err error) *mintError {
	var failed *mintError
	if errors.As(err, &failed) {
		return failed
	}

	var (
		unknownAuthority x509.UnknownAuthorityError
		hostname         x509.HostnameError
		invalid          x509.CertificateInvalidError
		verification     *tls.CertificateVerificationError
		recordHeader     tls.RecordHeaderError
		op               *net.OpError
		dns              *net.DNSError
	)

	switch {
	case errors.As(err, &unknownAuthority):
		return &mintError{class: classTLS, reason: "its certificate is signed by an authority that is not trusted here; set ca_cert if it is your own"}
	case errors.As(err, &hostname):
		return &mintError{class: classTLS, reason: "its certificate is for another host than token_url names"}
	case errors.As(err, &invalid):
		return &mintError{class: classTLS, reason: "its certificate is not valid: " + invalid.Error()}
	case errors.As(err, &verification):
		return &mintError{class: classTLS, reason: "its certificate could not be verified"}
	case errors.Is(err, http.ErrSchemeMismatch):
		return &mintError{class: classTLS, reason: "the endpoint speaks plain HTTP on that port, not TLS"}
	case errors.As(err, &recordHeader):
		return &mintError{class: classTLS, reason: "the endpoint does not speak TLS"}
	case errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"):
		// crypto/tls reports an alert so, in either direction.
		return &mintError{class: classTLS, reason: "the handshake failed: " + rootCause(op).Error()}
	case strings.HasPrefix(rootCause(err).Error(), "tls: "):
		return &mintError{class: classTLS, reason: "the handshake failed"}
	case errors.As(err, &dns):
		return &mintError{class: classNetwork, reason: "its host name does not resolve"}
	case errors.As(err, &op):
		return &mintError{class: classNetwork, reason: op.Op + ": " + rootCause(op).Error()}
	default:
		return &mintError{class: classNetwork, reason: "the connection broke before the answer was whole"}
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

// longestDescription bounds, in characters, what is quoted of MojoAuth.
const longestDescription = 256

// redactor takes a client secret, as it is and in the forms that it is sent in or may
// come back in, out of texts.
type redactor struct{ replace *strings.Replacer }

func newRedactor(clientID, clientSecret string) redactor {
	if clientSecret == "" {
		return redactor{}
	}
	query, path := url.QueryEscape(clientSecret), url.PathEscape(clientSecret)
	escaped := html.EscapeString(clientSecret)
	quoted, _ := json.Marshal(clientSecret)
	inJSON := string(quoted[1 : len(quoted)-1])
	plain := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(clientSecret)
	ascii := strconv.QuoteToASCII(clientSecret)
	ascii = ascii[1 : len(ascii)-1]
	forms := []string{
		base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(clientID) + ":" + query)),
		query, path, lowerEscapes(query), lowerEscapes(path),
		escaped,
		strings.NewReplacer("&#34;", "&quot;", "&#39;", "&apos;").Replace(escaped),
		strings.NewReplacer("&#34;", "&#x22;", "&#39;", "&#x27;").Replace(escaped),
		strings.NewReplacer("&#34;", "&quot;", "&#39;", "&#x27;").Replace(escaped),
	}
	for _, form := range []string{inJSON, plain, ascii} {
		forms = append(forms, form, strings.ReplaceAll(form, "/", `\/`))
	}
	var pairs []string
	for _, form := range append(forms, clientSecret) {
		pairs = append(pairs, form, "[redacted]")
	}
	return redactor{strings.NewReplacer(pairs...)}
}

var percentEscape = regexp.MustCompile("%[0-9A-F]{2}")

// lowerEscapes writes %2F as %2f.
func lowerEscapes(text string) string {
	return percentEscape.ReplaceAllStringFunc(text, strings.ToLower)
}

// clean makes a text of MojoAuth's fit for an error: redacted, on one line,
// without control characters, and cut.
func (r redactor) clean(text string) string {
	if r.replace != nil {
		text = r.replace.Replace(text)
	}
	text = strings.Map(func(c rune) rune {
		if unicode.IsControl(c) || !unicode.IsPrint(c) && c != ' ' {
			return -1
		}
		return c
	}, text)
	// Taking characters out may have put the secret together.
	if r.replace != nil {
		text = r.replace.Replace(text)
	}
	if runes := []rune(text); len(runes) > longestDescription {
		text = string(runes[:longestDescription-1]) + "…"
	}
	return text
}
