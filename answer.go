// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/redact"
)

// This file interprets an answer of the token endpoint, that is, an HTTP response read to
// its end. Its functions are pure: they turn an answer into a token or a mintError.

const (
	// maxAnswerBytes bounds the body and, separately, the header of an answer.
	maxAnswerBytes = 64 << 10

	// Bounds on what readers get to see of a token, in bytes.
	maxTokenType = 64
	maxScope     = 8 << 10
)

// answer is the complete response of the token endpoint.
type answer struct {
	status     int
	header     http.Header
	body       []byte // up to maxAnswerBytes+1: the extra byte shows that it was longer
	sentAt     time.Time
	receivedAt time.Time
}

// token is an access token as MojoAuth granted it.
type token struct {
	accessToken string
	tokenType   string
	scope       string // as granted, or as requested if the answer has no scope

	// mintedAt is when the request was sent. The lifetime counts from there, so a slow
	// answer never lengthens it.
	mintedAt time.Time
	// reported is the lifetime that the answer reports, 0 if it reports none.
	reported time.Duration
}

// oauthErrorClass has the OAuth errors of a token endpoint: RFC 6749 §5.2, RFC 8707 §2, and
// those of RFC 6749 §4.1.2.1 that servers also send here. They take precedence over the
// HTTP status.
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

// readAnswer turns an answer into a token or a mintError. The token has no scope if the
// answer has none.
func readAnswer(a *answer, secrets *redact.Redactor) (*token, *mintError) {
	fields, nonsense := parseFields(a.body)
	failed := readFailure(a, fields, secrets)
	switch {
	case failed != nil:
		return nil, failed
	case nonsense != "":
		return nil, a.failure(classUnexpected, nonsense)
	}
	return readToken(a, fields)
}

// readFailure returns a mintError for an answer that reports a failure, and nil for other
// answers.
func readFailure(a *answer, fields answerFields, secrets *redact.Redactor) *mintError {
	code := fields.text("error")
	class, failed := classify(a.status, code)
	if !failed {
		return nil
	}
	e := a.failure(class, "")
	e.oauthError, e.description = quote(code, describe(fields), secrets)
	switch {
	case class != classUnexpected:
	case a.status >= 300:
		e.reason = "it redirects, and the engine does not follow redirects because that would send the client secret elsewhere; set token_url to the endpoint's own URL"
	default:
		e.reason = interimStatus
	}
	return e
}

// interimStatus is what is wrong with an answer of status 1xx.
const interimStatus = "it answered with an interim status, which no token endpoint should send"

// classify returns the class of a failure, by the answer's status and its OAuth error code,
// which is "" if there is none. failed is false if the answer is no failure.
func classify(status int, code string) (class errorClass, failed bool) {
	class, known := oauthErrorClass[code]
	ok := status >= 200 && status <= 299
	switch {
	case known && (status != http.StatusTooManyRequests || class != classServerError):
		return class, true
	case ok && code == "":
		return "", false
	case ok: // a refusal with a status of success
		return classRequestRefused, true
	case status == http.StatusTooManyRequests:
		return classThrottled, true
	case status >= 500:
		return classServerError, true
	case status < 400:
		return classUnexpected, true
	}
	switch status {
	case http.StatusBadRequest,
		// These concern the content of the request, which differs from role to role.
		http.StatusRequestEntityTooLarge,
		http.StatusRequestURITooLong,
		http.StatusUnsupportedMediaType,
		http.StatusUnprocessableEntity,
		http.StatusRequestHeaderFieldsTooLarge:
		return classRequestRefused, true
	default:
		return classClientRefused, true
	}
}

// withheld replaces a description by MojoAuth that must not be shown.
const withheld = "[description withheld]"

// quote redacts what an answer says: its OAuth error and the parts of its description.
func quote(code string, parts []string, secrets *redact.Redactor) (oauthError, description string) {
	description = redact.Line(strings.Join(parts, "; "))
	if secrets.Withholds(append([]string{code}, parts...)...) {
		description = withheld
		if secrets.Withholds(code) {
			code = ""
		}
	}
	return redact.Line(code), description
}

// readToken returns the token of an answer that grants one.
func readToken(a *answer, fields answerFields) (*token, *mintError) {
	t := &token{
		accessToken: fields.text("access_token"),
		tokenType:   tokenType(fields.text("token_type")),
		scope:       grantedScope(fields["scope"]),
		mintedAt:    a.sentAt,
	}
	switch {
	case t.accessToken == "":
		return nil, a.failure(classUnexpected, "the response has no access_token")
	case strings.ContainsFunc(t.accessToken, func(r rune) bool { return r <= ' ' || r > '~' }):
		// RFC 6749 appendix A.12. Such a token would break out of a header.
		return nil, a.failure(classUnexpected, "the access_token contains characters that are not allowed in an access token")
	}
	t.reported = lifetime.Reported(expiresIn(fields["expires_in"], a.sentAt), t.accessToken, a.sentAt)
	if t.reported < 0 {
		return nil, a.failure(classExpiredOnArrival, "its exp claim had already passed when it was requested")
	}
	return t, nil
}

// failure returns a mintError of that class for this answer. reason may be empty.
func (a *answer) failure(class errorClass, reason string) *mintError {
	return &mintError{class: class, status: a.status, reason: reason, retryAfter: retryAfter(a.header, a.receivedAt)}
}

// answerFields has the fields of an answer's JSON object.
type answerFields map[string]json.RawMessage

// parseFields parses a body as a JSON object, whatever its content type. If it is not one,
// it returns no fields, and nonsense says what is wrong.
func parseFields(body []byte) (f answerFields, nonsense string) {
	switch {
	case len(body) > maxAnswerBytes:
		return nil, fmt.Sprintf("the response is longer than %d KiB", maxAnswerBytes>>10)
	case json.Unmarshal(body, &f) != nil || f == nil:
		return nil, "the response is not a JSON object"
	}
	return f, ""
}

// text returns a field's value, or "" if it is absent or not a string.
func (f answerFields) text(name string) string {
	var s string
	if json.Unmarshal(f[name], &s) != nil {
		return ""
	}
	return s
}

// describe returns the answer's description of a failure: RFC 6749's error_description, or
// MojoAuth's message and description. MojoAuth's error numbers have different meanings in
// its different tables, so they are shown but decide nothing.
func describe(fields answerFields) (parts []string) {
	if d := fields.text("error_description"); d != "" {
		return []string{d}
	}
	for _, name := range []string{"message", "description"} {
		if s := fields.text(name); s != "" {
			parts = append(parts, s)
		}
	}
	for _, name := range []string{"error_code", "ErrorCode", "code"} {
		var number json.Number
		if json.Unmarshal(fields[name], &number) == nil && number != "" {
			return append(parts, "MojoAuth error "+number.String())
		}
	}
	return parts
}

// tokenType reads token_type: a type's name or a URI (RFC 6749 appendix A.13). It returns
// Bearer for anything else and if there is none.
func tokenType(reported string) string {
	const inURI = "-._~:/?#[]@!$&'()*+,;=%" // RFC 3986 §2, beside letters and digits
	odd := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(inURI, r)
	}
	if reported == "" || len(reported) > maxTokenType || strings.ContainsFunc(reported, odd) || strings.EqualFold(reported, "bearer") {
		return "Bearer"
	}
	return reported
}

// grantedScope reads scope: a string (RFC 6749 §3.3) or, as a tolerance, a list of strings.
// It drops what is not a scope, and what exceeds the bound.
func grantedScope(raw json.RawMessage) string {
	var list []string
	if json.Unmarshal(raw, &list) != nil {
		var s string
		if json.Unmarshal(raw, &s) != nil {
			return ""
		}
		list = []string{s}
	}
	odd := func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }
	var granted strings.Builder
	for scope := range strings.FieldsSeq(strings.Join(list, " ")) {
		if strings.ContainsFunc(scope, odd) {
			continue
		}
		if granted.Len()+len(" ")+len(scope) > maxScope {
			break
		}
		if granted.Len() > 0 {
			granted.WriteByte(' ')
		}
		granted.WriteString(scope)
	}
	return granted.String()
}

// expiresIn reads a lifetime in whole seconds, in any form seen in MojoAuth's APIs: a
// number, a number in a string, or an RFC 3339 time. It returns 0 if the field is absent,
// null, unreadable, less than a second, or in the past.
func expiresIn(raw json.RawMessage, sentAt time.Time) time.Duration {
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
	return time.Duration(min(seconds, lifetime.Longest.Seconds())) * time.Second
}

// longestRetryAfter caps Retry-After.
const longestRetryAfter = 10 * time.Minute

// retryAfter reads Retry-After (RFC 9110 §10.2.3), which is a number of seconds or a date.
// It returns 0 if the server requests no wait.
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
