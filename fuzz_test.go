// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// roundTripper answers requests in process.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// FuzzAnswer passes any answer through the whole client. The result is a token that is
// safe to send and cache, or an error that is safe to show.
func FuzzAnswer(f *testing.F) {
	f.Add(200, "", `{"access_token":"tok","expires_in":3600,"token_type":"bearer","scope":"a b"}`)
	f.Add(200, "", `{"access_token":"tok","expires_in":"2027-01-01T00:00:00Z","scope":["a"]}`)
	f.Add(200, "", `{"access_token":"tok","expires_in":1e400}`)
	f.Add(200, "", `{"access_token":"`+jwt(`{"exp":1e18}`)+`","expires_in":-0}`)
	f.Add(200, "", `{"error":"invalid_scope","error_description":"`+canary+`"}`)
	f.Add(400, "", `{"error_code":900,"message":"bad","description":"no `+canary+`"}`)
	f.Add(400, "", `{"error":"node is not","error_description":"`+canary[:20]+`","access_token":"t"}`)
	f.Add(403, "", `{"message":"please forward to the active node","description":"or not"}`)
	f.Add(200, "", `{"access_token":"t","token_type":"a\nb","scope":"a\"b\n c"}`)
	f.Add(401, "", `{"ErrorCode":"1","message":{},"error":{"code":5}}`)
	f.Add(403, "", `{"error":"access_denied"}`)
	f.Add(429, "Wed, 21 Oct 2099 07:28:00 GMT", ``)
	f.Add(503, "18446744073709551616", "\x00\xff<html>")
	f.Add(307, "-1", `null`)
	f.Add(101, "1.5", `[]`)
	f.Add(999, "", `{"access_token":"`+strings.Repeat("x", maxAnswerBytes)+`"}`)
	f.Fuzz(func(t *testing.T, status int, wait, body string) {
		status = 100 + abs(status)%900
		header := http.Header{"Retry-After": {wait}}
		config := &configEntry{
			TokenURL: "https://mojoauth.test/", ClientID: "client", ClientSecret: canary,
			TokenEndpointAuthMethod: authMethodPost, RequestTimeout: 10 * time.Second,
		}
		client := newTokenClientOver(config, "", func(context.Context) http.RoundTripper {
			return roundTripper(func(r *http.Request) (*http.Response, error) {
				return &http.Response{
					StatusCode: status, Header: header, Request: r,
					Body: io.NopCloser(bytes.NewReader([]byte(body))),
				}, nil
			})
		})
		tok, err := client.mint(t.Context(), tokenRequest{scopes: []string{"a"}}, new(testTurn))
		if err == nil {
			if tok.accessToken == "" || strings.ContainsFunc(tok.accessToken, func(r rune) bool { return r <= 0x20 || r > 0x7e }) {
				t.Errorf("got the token %q", tok.accessToken)
			}
			if tok.reported < 0 || tok.reported > lifetime.Longest || tok.reported > 0 && tok.reported < time.Nanosecond {
				t.Errorf("got the lifetime %s", tok.reported)
			}
			if tok.tokenType == "" || len(tok.tokenType) > maxTokenType || strings.ContainsFunc(tok.tokenType, func(r rune) bool { return r <= 0x20 || r > 0x7e }) {
				t.Errorf("got the type %q", tok.tokenType)
			}
			if tok.scope == "" || len(tok.scope) > maxScope || strings.ContainsFunc(tok.scope, func(r rune) bool { return r < 0x20 || r > 0x7e || r == '"' || r == '\\' }) {
				t.Errorf("got the scope %q", tok.scope)
			}
			return
		}
		if status == http.StatusTooManyRequests && errors.Is(err, errNoTurn) {
			return
		}
		var failed *mintError
		if !errors.As(err, &failed) {
			t.Fatalf("got the error %v (%T), want a *mintError", err, err)
		}
		text := failed.Error()
		if holdsHalfOf(text, canary) {
			t.Errorf("the error contains half of the client secret: %q", text)
		}
		if forwardsElsewhere(text) {
			t.Errorf("the error %q would make Vault forward the request", text)
		}
		if strings.ContainsFunc(text, unicode.IsControl) {
			t.Errorf("the error contains control characters: %q", text)
		}
		if len([]rune(text)) > 3*256 {
			t.Errorf("the error is %d characters long", len([]rune(text)))
		}
		if failed.retryAfter < 0 || failed.retryAfter > longestRetryAfter {
			t.Errorf("got Retry-After %s", failed.retryAfter)
		}
		if failed.class == "" || failed.status != status {
			t.Errorf("got class %q and status %d for %d", failed.class, failed.status, status)
		}
	})
}

// holdsHalfOf reports whether text contains half of the secret in one piece, in any case.
func holdsHalfOf(text, secret string) bool {
	half := (len(secret) + 1) / 2
	for start := 0; start+half <= len(secret); start++ {
		if strings.Contains(strings.ToLower(text), strings.ToLower(secret[start:start+half])) {
			return true
		}
	}
	return false
}

func abs(n int) int {
	if n < 0 {
		return -(n + 1)
	}
	return n
}
