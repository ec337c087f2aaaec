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

// This file says what an answer of the token endpoint means: pure functions
// from what came back to a token or to a mintError.

const (
	// maxAnswerBytes bounds the body and, separately, the header of an answer.
	maxAnswerBytes = 64 << 10

	// Bounds of what readers are told of a token, in bytes.
	maxTokenType = 64
	maxScope     = 8 << 10
)

// answer is what came back from the token endpoint: all of it.
type answer struct {
	status     int
	header     http.Header
	body       []byte // up to maxAnswerBytes+1: one more says that it was longer
	sentAt     time.Time
	receivedAt time.Time
}

// token is an access token as MojoAuth granted it.
type token struct {
	accessToken string
	tokenType   string
	scope       string // granted, as MojoAuth said or, when it did not, as asked for

	// mintedAt is when the request that was answered with the token was sent:
	// its life counts from there, so that a slow answer never lengthens it.
	mintedAt time.Time
	// told is the lifetime that the answer told, 0 when it told none.
	told time.Duration
}

// oauthErrorClass has the OAuth errors of a token endpoint: RFC 6749 §5.2,
// RFC 8707 §2, and those of §4.1.2.1 that servers send here too. They decide
// before the HTTP status.
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

// readAnswer makes a token or a mintError of an answer. The token has no scope
// when the answer tells none.
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

// readFailure makes a mintError of an answer that says no, nil of another one.
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
		e.reason = "it redirects, which is not followed because it would send the client secret elsewhere; set token_url to where the endpoint is"
	default:
		e.reason = interimStatus
	}
	return e
}

// interimStatus is what is wrong with an answer of 1xx.
const interimStatus = "its status is an interim one, and no token endpoint has to send it"

// classify says what kind of failure an answer is, by its status and its OAuth
// error, "" when there is none.
func classify(status int, code string) (class errorClass, failed bool) {
	class, known := oauthErrorClass[code]
	ok := status >= 200 && status <= 299
	switch {
	case known && !(status == http.StatusTooManyRequests && class == classServerError):
		return class, true
	case ok && code == "":
		return "", false
	case ok: // a refusal under a status that says success
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
		// These are about what was sent, and each role sends something else.
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

// withheld stands in for words of MojoAuth's that must not be shown.
const withheld = "[description withheld]"

// quote makes what an answer says fit to be shown: its OAuth error and the parts of
// its description.
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

// readToken makes a token of an answer that says yes.
func readToken(a *answer, fields answerFields) (*token, *mintError) {
	t := &token{
		accessToken: fields.text("access_token"),
		tokenType:   tokenType(fields.text("token_type")),
		scope:       grantedScope(fields["scope"]),
		mintedAt:    a.sentAt,
	}
	switch {
	case t.accessToken == "":
		return nil, a.failure(classUnexpected, "the answer has no access_token")
	case strings.ContainsFunc(t.accessToken, func(r rune) bool { return r <= ' ' || r > '~' }):
		// RFC 6749 appendix A.12. Such a token would break out of a header.
		return nil, a.failure(classUnexpected, "the access_token holds characters that no access token may have")
	}
	t.told = lifetime.Told(expiresIn(fields["expires_in"], a.sentAt), t.accessToken, a.sentAt)
	if t.told < 0 {
		return nil, a.failure(classExpiredOnArrival, "its exp claim had already passed when it was requested")
	}
	return t, nil
}

// failure is a mint that failed by this answer. reason may be empty.
func (a *answer) failure(class errorClass, reason string) *mintError {
	return &mintError{class: class, status: a.status, reason: reason, retryAfter: retryAfter(a.header, a.receivedAt)}
}

// answerFields are those of the JSON object that an answer holds.
type answerFields map[string]json.RawMessage

// parseFields reads a body as a JSON object, under any content type. It has no
// fields when it is none, and nonsense says why.
func parseFields(body []byte) (f answerFields, nonsense string) {
	switch {
	case len(body) > maxAnswerBytes:
		return nil, fmt.Sprintf("the answer is longer than %d KiB", maxAnswerBytes>>10)
	case json.Unmarshal(body, &f) != nil || f == nil:
		return nil, "the answer is no JSON object"
	}
	return f, ""
}

// text is a field's value, "" when it is absent or no string.
func (f answerFields) text(name string) string {
	var s string
	if json.Unmarshal(f[name], &s) != nil {
		return ""
	}
	return s
}

// describe is what the answer says in words: RFC 6749's error_description, or
// MojoAuth's message and description. MojoAuth's numbers mean different things
// in different tables; they are shown, and decide nothing.
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

// tokenType reads token_type: a type's name or a URI (RFC 6749 appendix A.13).
// Anything else is dropped, and Bearer taken instead, as it is when there is none.
func tokenType(told string) string {
	const inURI = "-._~:/?#[]@!$&'()*+,;=%" // RFC 3986 §2, beside letters and digits
	odd := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(inURI, r)
	}
	if told == "" || len(told) > maxTokenType || strings.ContainsFunc(told, odd) || strings.EqualFold(told, "bearer") {
		return "Bearer"
	}
	return told
}

// grantedScope reads scope: a string (RFC 6749 §3.3) or, tolerated, a list of
// strings. What is no scope, or beyond the bound, is dropped.
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

// expiresIn reads a lifetime in whole seconds from any form seen in MojoAuth's
// APIs: a number, a number in a string, or an RFC 3339 time. 0 means that the
// field tells none: absent, null, unreadable, below a second, or past.
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
