// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// endpoint is a token endpoint whose answers the test specifies.
type endpoint struct {
	*httptest.Server
	requests atomic.Int64
	last     atomic.Pointer[recorded]
}

type recorded struct {
	method, query, body string
	header              http.Header
}

func newEndpoint(t *testing.T, answer http.HandlerFunc) *endpoint {
	t.Helper()
	e := &endpoint{}
	e.Server = httptest.NewServer(e.record(answer))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) record(answer http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		e.last.Store(&recorded{r.Method, r.URL.RawQuery, string(body), r.Header})
		e.requests.Add(1)
		answer(w, r)
	}
}

func says(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func (e *endpoint) config(change func(*configEntry)) *configEntry {
	config := &configEntry{
		TokenURL:                e.URL + "/oauth2/token",
		ClientID:                "client",
		ClientSecret:            canary,
		TokenEndpointAuthMethod: authMethodPost,
		RequestTimeout:          10 * time.Second,
	}
	if change != nil {
		change(config)
	}
	return config
}

func mintOnce(t *testing.T, config *configEntry, req tokenRequest) (*token, *mintError) {
	t.Helper()
	client, err := newTokenClient(config, "agent/1")
	if err != nil {
		t.Fatal(err)
	}
	tok, err := client.mint(t.Context(), req, new(testTurn))
	if err == nil {
		return tok, nil
	}
	var failed *mintError
	if !errors.As(err, &failed) {
		t.Fatalf("got the error %v (%T), want a *mintError", err, err)
	}
	if strings.Contains(failed.Error(), canary) {
		t.Errorf("the error contains the client secret: %v", failed)
	}
	return nil, failed
}

const goodAnswer = `{"access_token":"tok","expires_in":3600}`

// The request format is a contract: RFC 6749 §4.4.2, §2.3.1 and appendix B.
func TestMintSendsWhatTheProtocolRequires(t *testing.T) {
	const (
		id     = "id:with/res+rved &=%?#@ü"
		secret = "s:e/c+r e&t=%41?#@ü~\"\\"
	)
	e := newEndpoint(t, says(200, goodAnswer))
	req := tokenRequest{
		audience: "https://api.example.org/?a=b&c",
		scopes:   []string{"read:a+b", "write"},
		extra:    map[string]string{"resource": "urn:x y"},
	}

	for _, method := range []string{authMethodPost, authMethodBasic} {
		config := e.config(func(c *configEntry) {
			c.TokenURL += "?env=test&x=%20y"
			c.ClientID, c.ClientSecret, c.TokenEndpointAuthMethod = id, secret, method
		})
		if _, failed := mintOnce(t, config, req); failed != nil {
			t.Fatalf("%s: %v", method, failed)
		}
		got := e.last.Load()
		if got.method != "POST" || got.query != "env=test&x=%20y" {
			t.Errorf("%s: got %s with query %q", method, got.method, got.query)
		}
		if ct := got.header.Get("Content-Type"); ct != "application/x-www-form-urlencoded" {
			t.Errorf("%s: got content type %q", method, ct)
		}
		if ua := got.header.Get("User-Agent"); ua != "agent/1" {
			t.Errorf("%s: got user agent %q", method, ua)
		}
		form, err := url.ParseQuery(got.body)
		if err != nil {
			t.Fatal(err)
		}
		want := url.Values{
			"grant_type": {"client_credentials"},
			"audience":   {"https://api.example.org/?a=b&c"},
			"scope":      {"read:a+b write"},
			"resource":   {"urn:x y"},
		}
		authorization := ""
		if method == authMethodPost {
			want.Set("client_id", id)
			want.Set("client_secret", secret)
		} else {
			authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(id)+":"+url.QueryEscape(secret)))
		}
		if form.Encode() != want.Encode() {
			t.Errorf("%s: got the form %v, want %v", method, form, want)
		}
		if a := got.header.Get("Authorization"); a != authorization {
			t.Errorf("%s: got Authorization %q, want %q", method, a, authorization)
		}
	}

	if _, failed := mintOnce(t, e.config(nil), tokenRequest{}); failed != nil {
		t.Fatal(failed)
	}
	if form, _ := url.ParseQuery(e.last.Load().body); form.Has("scope") || form.Has("audience") {
		t.Errorf("without scopes and audience: got the form %v, want neither", form)
	}
	if e.requests.Load() != 3 {
		t.Errorf("got %d requests for 3 mints", e.requests.Load())
	}
}

func TestMintAcceptsEveryValidAnswer(t *testing.T) {
	at := time.Now().Add(2 * time.Hour).UTC().Format(time.RFC3339)
	cases := []struct {
		name, answer     string
		reported         time.Duration // within 5 s
		tokenType, scope string
	}{
		{"plain", `{"access_token":"tok","token_type":"Bearer","expires_in":3600,"scope":"a"}`, time.Hour, "Bearer", "a"},
		{"bare", `{"access_token":"tok"}`, 0, "Bearer", "a b"},
		{"lower-case type", `{"access_token":"tok","token_type":"bearer"}`, 0, "Bearer", "a b"},
		{"other type", `{"access_token":"tok","token_type":"DPoP"}`, 0, "DPoP", "a b"},
		{"float", `{"access_token":"tok","expires_in":3600.7}`, time.Hour, "Bearer", "a b"},
		{"exponent", `{"access_token":"tok","expires_in":3.6e3}`, time.Hour, "Bearer", "a b"},
		{"numeric string", `{"access_token":"tok","expires_in":"3600"}`, time.Hour, "Bearer", "a b"},
		{"RFC 3339", `{"access_token":"tok","expires_in":"` + at + `"}`, 2 * time.Hour, "Bearer", "a b"},
		{"RFC 3339 past", `{"access_token":"tok","expires_in":"2001-01-01T00:00:00Z"}`, 0, "Bearer", "a b"},
		{"null", `{"access_token":"tok","expires_in":null}`, 0, "Bearer", "a b"},
		{"zero", `{"access_token":"tok","expires_in":0}`, 0, "Bearer", "a b"},
		{"negative", `{"access_token":"tok","expires_in":-5}`, 0, "Bearer", "a b"},
		{"below a second", `{"access_token":"tok","expires_in":0.9}`, 0, "Bearer", "a b"},
		{"unreadable", `{"access_token":"tok","expires_in":"soon"}`, 0, "Bearer", "a b"},
		{"not a number", `{"access_token":"tok","expires_in":"NaN"}`, 0, "Bearer", "a b"},
		{"odd type", `{"access_token":"tok","expires_in":{"seconds":5}}`, 0, "Bearer", "a b"},
		{"endless", `{"access_token":"tok","expires_in":1e308}`, lifetime.Longest, "Bearer", "a b"},
		{"infinite", `{"access_token":"tok","expires_in":"Inf"}`, lifetime.Longest, "Bearer", "a b"},
		{"scope empty", `{"access_token":"tok","scope":""}`, 0, "Bearer", "a b"},
		{"scope as a list", `{"access_token":"tok","scope":["a","c"]}`, 0, "Bearer", "a c"},
		{"unknown fields", `{"access_token":"tok","refresh_token":"r","x":[{}],"error":null}`, 0, "Bearer", "a b"},
		{"error empty", `{"access_token":"tok","error":""}`, 0, "Bearer", "a b"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/html; charset=latin1")
				says(200, c.answer)(w, r)
			})
			tok, failed := mintOnce(t, e.config(nil), tokenRequest{scopes: []string{"a", "b"}})
			if failed != nil {
				t.Fatal(failed)
			}
			if tok.accessToken != "tok" || tok.tokenType != c.tokenType || tok.scope != c.scope {
				t.Errorf("got token %q, type %q, scope %q", tok.accessToken, tok.tokenType, tok.scope)
			}
			if off := tok.reported - c.reported; off < -5*time.Second || off > 0 {
				t.Errorf("got lifetime %s, want %s", tok.reported, c.reported)
			}
		})
	}
}

func TestMintClassifiesEveryBadAnswer(t *testing.T) {
	cases := []struct {
		name   string
		status int
		body   string
		class  errorClass
		tries  int64 // with two retries
		text   string
	}{
		{"wrong secret", 401, `{"error":"invalid_client","error_description":"no such client"}`, classClientRefused, 1, "invalid_client: no such client (HTTP 401)"},
		{"wrong secret as 400", 400, `{"error":"invalid_client"}`, classClientRefused, 1, "invalid_client (HTTP 400)"},
		{"client not allowed", 400, `{"error":"unauthorized_client"}`, classClientRefused, 1, "unauthorized_client"},
		{"scope", 400, `{"error":"invalid_scope"}`, classRequestRefused, 1, "invalid_scope"},
		{"target", 400, `{"error":"invalid_target"}`, classRequestRefused, 1, "invalid_target"},
		{"request", 400, `{"error":"invalid_request"}`, classRequestRefused, 1, "invalid_request"},
		{"denied by 403", 403, `{"error":"access_denied"}`, classRequestRefused, 1, "access_denied (HTTP 403)"},
		{"other 400", 400, `{"error":"something"}`, classRequestRefused, 1, "something (HTTP 400)"},
		{"400 without JSON", 400, `<html>`, classRequestRefused, 1, "(HTTP 400)"},
		{"MojoAuth's shape", 400, `{"error_code":900,"message":"bad","description":"api key"}`, classRequestRefused, 1, "bad; api key; MojoAuth error 900 (HTTP 400)"},
		{"MojoAuth's other shape", 401, `{"code":"12","message":"bad"}`, classClientRefused, 1, "bad; MojoAuth error 12 (HTTP 401)"},
		{"bare 401", 401, ``, classClientRefused, 1, "(HTTP 401)"},
		{"bare 403", 403, ``, classClientRefused, 1, "(HTTP 403)"},
		{"not found", 404, `page not found`, classClientRefused, 1, "(HTTP 404)"},
		{"teapot", 418, ``, classClientRefused, 1, "(HTTP 418)"},
		{"500", 500, ``, classServerError, 3, "(HTTP 500)"},
		{"501", 501, ``, classServerError, 1, "(HTTP 501)"},
		{"502", 502, `<html>bad gateway</html>`, classServerError, 3, "(HTTP 502)"},
		{"503", 503, `{"error":"temporarily_unavailable"}`, classServerError, 3, "temporarily_unavailable (HTTP 503)"},
		{"504", 504, ``, classServerError, 3, "(HTTP 504)"},
		{"599", 599, ``, classServerError, 1, "(HTTP 599)"},
		{"redirect", 307, ``, classUnexpected, 1, "redirects"},
		{"304", 304, ``, classUnexpected, 1, "redirects"},
		{"empty", 200, ``, classUnexpected, 1, "not a JSON object"},
		{"HTML", 200, `<html>`, classUnexpected, 1, "not a JSON object"},
		{"null", 200, `null`, classUnexpected, 1, "not a JSON object"},
		{"list", 200, `[]`, classUnexpected, 1, "not a JSON object"},
		{"no token", 200, `{"token_type":"Bearer"}`, classUnexpected, 1, "no access_token"},
		{"token no string", 200, `{"access_token":5}`, classUnexpected, 1, "no access_token"},
		{"token with a line end", 200, `{"access_token":"a\r\nX: y"}`, classUnexpected, 1, "not allowed in an access token"},
		{"ended JWT", 200, `{"access_token":"` + jwt(`{"exp":5}`) + `"}`, classExpiredOnArrival, 1, "exp claim had already passed"},
		{"error under 200", 200, `{"error":"invalid_client"}`, classClientRefused, 1, "invalid_client (HTTP 200)"},
		{"error beside a token", 200, `{"access_token":"t","error":"invalid_scope"}`, classRequestRefused, 1, "invalid_scope (HTTP 200)"},
		{"unknown error under 200", 200, `{"error":"whatever"}`, classRequestRefused, 1, "whatever (HTTP 200)"},
		{"204", 204, ``, classUnexpected, 1, "not a JSON object"},
		{"too long", 200, `{"access_token":"t","x":"` + strings.Repeat("x", maxAnswerBytes) + `"}`, classUnexpected, 1, "longer than 64 KiB"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", "/elsewhere")
				says(c.status, c.body)(w, r)
			})
			_, failed := mintOnce(t, e.config(nil), tokenRequest{retries: 2})
			if failed == nil {
				t.Fatal("got a token")
			}
			if failed.class != c.class || failed.status != c.status {
				t.Errorf("got class %s and status %d, want %s and %d", failed.class, failed.status, c.class, c.status)
			}
			if !strings.Contains(failed.Error(), c.text) {
				t.Errorf("got %q, want it to contain %q", failed, c.text)
			}
			if got := e.requests.Load(); got != c.tries {
				t.Errorf("got %d requests, want %d", got, c.tries)
			}
		})
	}
}

// A client's redactor knows what to withhold: its secret, and the texts that make Vault
// or OpenBao forward a request.
func TestMintWithholdsDescriptions(t *testing.T) {
	for _, description := range []string{canary[1:], "cannot write to readonly storage"} {
		e := newEndpoint(t, says(400, fmt.Sprintf(`{"error":"invalid_scope","error_description":%q}`, description)))
		_, failed := mintOnce(t, e.config(nil), tokenRequest{})
		if want := "MojoAuth refused the request: invalid_scope: [description withheld] (HTTP 400)"; failed == nil || failed.Error() != want {
			t.Errorf("%q: got %v, want %q", description, failed, want)
		}
	}
}

func TestMintDoesNotFollowRedirects(t *testing.T) {
	other := newEndpoint(t, says(200, goodAnswer))
	for _, status := range []int{301, 302, 303, 307, 308} {
		e := newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, status)
		})
		if _, failed := mintOnce(t, e.config(nil), tokenRequest{}); failed == nil || failed.class != classUnexpected {
			t.Errorf("%d: got %v, want an error", status, failed)
		}
	}
	if got := other.requests.Load(); got != 0 {
		t.Errorf("the other host received %d requests", got)
	}
}

func TestMintBoundsWhatItReads(t *testing.T) {
	var sent atomic.Int64
	e := newEndpoint(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		zip := gzip.NewWriter(w)
		chunk := bytes.Repeat([]byte("x"), 1<<20)
		for range 100 {
			n, err := zip.Write(chunk)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	client, err := newTokenClient(e.config(nil), "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.mint(t.Context(), tokenRequest{}, new(testTurn))
	var failed *mintError
	if !errors.As(err, &failed) || !strings.Contains(failed.reason, "longer than 64 KiB") {
		t.Errorf("got %v, want an error for the answer's length", err)
	}
}

// A 10 MB body costs less than 1 MB: the client does not read the rest.
func TestMintTakesLittleMemory(t *testing.T) {
	var read atomic.Int64
	endless := roundTripper(func(r *http.Request) (*http.Response, error) {
		body := io.TeeReader(io.LimitReader(neverending('x'), 10<<20), countingWriter{&read})
		return &http.Response{StatusCode: 200, Body: io.NopCloser(body), Request: r}, nil
	})
	client := newTokenClientOver((&endpoint{Server: &httptest.Server{}}).config(nil), "", func(context.Context) http.RoundTripper { return endless })
	allocated := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if _, err := client.mint(context.Background(), tokenRequest{}, new(testTurn)); err == nil {
				b.Fatal("got a token")
			}
		}
	}).AllocedBytesPerOp()
	if allocated == 0 || allocated >= 1<<20 {
		t.Errorf("a mint with a 10 MB answer allocated %d bytes, want less than 1 MB", allocated)
	}
	t.Logf("allocated %d bytes", allocated)
	read.Store(0)
	_, _ = client.mint(t.Context(), tokenRequest{}, new(testTurn))
	if got := read.Load(); got == 0 || got > 2*maxAnswerBytes {
		t.Errorf("%d of 10 MB were read", got)
	}
}

type neverending byte

func (n neverending) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(n)
	}
	return len(p), nil
}

type countingWriter struct{ n *atomic.Int64 }

func (c countingWriter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func TestMintRetriesABrokenAnswer(t *testing.T) {
	var e *endpoint
	e = newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if e.requests.Load() < 3 {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `{"access_token":`)
			panic(http.ErrAbortHandler)
		}
		says(200, goodAnswer)(w, r)
	})
	if _, failed := mintOnce(t, e.config(nil), tokenRequest{retries: 2}); failed != nil {
		t.Errorf("got %v, want the third try's token", failed)
	}
	e.requests.Store(0)
	if _, failed := mintOnce(t, e.config(nil), tokenRequest{retries: 1}); failed == nil || failed.class != classNetwork {
		t.Errorf("got %v, want a network error after two tries", failed)
	}
}

func TestMintWithoutAServer(t *testing.T) {
	e := newEndpoint(t, says(200, goodAnswer))
	e.Close()
	_, failed := mintOnce(t, e.config(nil), tokenRequest{})
	if failed == nil || failed.class != classNetwork || !strings.Contains(failed.Error(), "connection refused") {
		t.Errorf("got %v, want a network error that says connection refused", failed)
	}
}

func TestMintEndsInTime(t *testing.T) {
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	short := func(c *configEntry) { c.RequestTimeout = 200 * time.Millisecond }

	e := newEndpoint(t, hang)
	_, failed := mintOnce(t, e.config(short), tokenRequest{retries: 2})
	if failed == nil || failed.class != classTimeout || !strings.Contains(failed.Error(), "200ms") {
		t.Errorf("a server that hangs: got %v, want a timeout that gives the time allowed", failed)
	}

	// The server answered with an error, so that is the failure.
	first := true
	e = newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if first {
			first = false
			w.WriteHeader(503)
			return
		}
		hang(w, r)
	})
	_, failed = mintOnce(t, e.config(func(c *configEntry) { c.RequestTimeout = time.Second }), tokenRequest{retries: 2})
	if failed == nil || failed.class != classServerError || failed.status != 503 {
		t.Errorf("a server that answers 503 and then hangs: got %v, want the 503", failed)
	}

	// The connection failed and no time is left for a retry, so that is the failure too.
	e = newEndpoint(t, says(200, goodAnswer))
	e.Close()
	_, failed = mintOnce(t, e.config(func(c *configEntry) { c.RequestTimeout = 300 * time.Millisecond }), tokenRequest{retries: 10})
	if failed == nil || failed.class != classNetwork || !strings.Contains(failed.Error(), "connection refused") {
		t.Errorf("no server until the time is over: got %v, want the network error", failed)
	}

	// The connection broke, and the next try got no answer.
	broken := true
	e = newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if broken {
			broken = false
			panic(http.ErrAbortHandler)
		}
		hang(w, r)
	})
	_, failed = mintOnce(t, e.config(func(c *configEntry) { c.RequestTimeout = time.Second }), tokenRequest{retries: 2})
	if failed == nil || failed.class != classTimeout {
		t.Errorf("a connection that breaks and then hangs: got %v, want a timeout", failed)
	}

	// A caller that gives up is not MojoAuth's fault.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	client, err := newTokenClient(newEndpoint(t, hang).config(nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.mint(ctx, tokenRequest{}, new(testTurn)); err != context.DeadlineExceeded {
		t.Errorf("got %v, want the context's own error", err)
	}
}

// A throttled request waits for another turn, which does not count as a retry. The
// wording of the endpoint's answer does not matter.
func TestThrottledRequestWaitsForAnotherTurn(t *testing.T) {
	answers := []http.HandlerFunc{
		func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "20")
			w.WriteHeader(http.StatusTooManyRequests)
		},
		says(200, goodAnswer),
	}
	for _, body := range []string{``, `{"error":"temporarily_unavailable"}`} {
		var e *endpoint
		e = newEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
			answers[e.requests.Load()-1](w, r)
			if e.requests.Load() == 1 {
				_, _ = io.WriteString(w, body)
			}
		})
		client, err := newTokenClient(e.config(nil), "")
		if err != nil {
			t.Fatal(err)
		}
		leave := new(testTurn)
		if _, err := client.mint(t.Context(), tokenRequest{}, leave); err != nil {
			t.Fatal(err)
		}
		if want := []gate.Answer{gate.Throttled, gate.Answered}; !slices.Equal(leave.answers, want) || leave.asked[0] != 20*time.Second {
			t.Errorf("the gate saw %v with Retry-After %v, want %v with 20s", leave.answers, leave.asked, want)
		}
	}

	// If there is no other turn, the error says so, not that the endpoint throttles.
	e := newEndpoint(t, says(429, ``))
	client, err := newTokenClient(e.config(nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.mint(t.Context(), tokenRequest{}, new(testTurn)); err != errNoTurn {
		t.Errorf("got %v, want the error for no turn", err)
	}
}

// A Retry-After from a failing server also closes the gate. One that comes with a refusal
// does not: a single role, or one reader's scopes, would close the gate for everyone.
func TestRetryAfterThatClosesTheGate(t *testing.T) {
	for status, want := range map[int]time.Duration{503: 20 * time.Second, 400: 0, 403: 0} {
		e := newEndpoint(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "20")
			w.WriteHeader(status)
		})
		client, err := newTokenClient(e.config(nil), "")
		if err != nil {
			t.Fatal(err)
		}
		leave := new(testTurn)
		if _, err := client.mint(t.Context(), tokenRequest{}, leave); err == nil {
			t.Fatal("got a token")
		}
		if !slices.Equal(leave.answers, []gate.Answer{gate.Answered}) || leave.asked[0] != want {
			t.Errorf("HTTP %d: the gate saw %v with Retry-After %v, want %s", status, leave.answers, leave.asked, want)
		}
	}
}

func TestMintVerifiesCertificates(t *testing.T) {
	e := &endpoint{}
	e.Server = httptest.NewUnstartedServer(e.record(says(200, goodAnswer)))
	e.Config.ErrorLog = discardLog()
	e.StartTLS()
	defer e.Close()

	_, failed := mintOnce(t, e.config(nil), tokenRequest{retries: 2})
	if failed == nil || failed.class != classTLS || !strings.Contains(failed.Error(), "ca_cert") {
		t.Errorf("an unknown authority: got %v, want a TLS error that names ca_cert", failed)
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate().Raw}))
	trusting := func(c *configEntry) { c.CACert = ca }
	if _, failed := mintOnce(t, e.config(trusting), tokenRequest{}); failed != nil {
		t.Errorf("with ca_cert: %v", failed)
	}
	_, failed = mintOnce(t, e.config(func(c *configEntry) {
		trusting(c)
		c.TokenURL = strings.Replace(c.TokenURL, "127.0.0.1", "localhost", 1)
	}), tokenRequest{})
	if failed == nil || failed.class != classTLS || !strings.Contains(failed.Error(), "a different host") {
		t.Errorf("another host's certificate: got %v, want a TLS error", failed)
	}
	if e.requests.Load() != 1 {
		t.Errorf("got %d requests, want only the trusted one", e.requests.Load())
	}

	// A server that speaks plain HTTP on that port.
	plainHTTP := newEndpoint(t, says(200, goodAnswer))
	_, failed = mintOnce(t, plainHTTP.config(func(c *configEntry) {
		c.TokenURL = strings.Replace(c.TokenURL, "http://", "https://", 1)
	}), tokenRequest{retries: 2})
	if failed == nil || failed.class != classTLS || !strings.Contains(failed.Error(), "plain HTTP") {
		t.Errorf("plain HTTP: got %v, want a TLS error that says so", failed)
	}

	// Plain TCP instead of TLS.
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	go func() {
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "220 hello\r\n")
			conn.Close()
		}
	}()
	_, failed = mintOnce(t, e.config(func(c *configEntry) {
		c.TokenURL = fmt.Sprintf("https://%s/", plain.Addr())
	}), tokenRequest{})
	if failed == nil || (failed.class != classTLS && failed.class != classNetwork) {
		t.Errorf("no TLS at all: got %v", failed)
	}
}

// mintThrough mints through a proxy that answers with the given handler.
func mintThrough(t *testing.T, config *configEntry, proxy http.HandlerFunc) (*mintError, int64) {
	t.Helper()
	e := newEndpoint(t, proxy)
	settings, err := newTransport(config.CACert)
	if err != nil {
		t.Fatal(err)
	}
	address, err := url.Parse(e.URL)
	if err != nil {
		t.Fatal(err)
	}
	settings.Proxy = proxyFor(http.ProxyURL(address))
	client := newTokenClientOver(config, "", func(ctx context.Context) http.RoundTripper { return mintTransport(ctx, settings) })
	_, err = client.mint(t.Context(), tokenRequest{}, new(testTurn))
	var failed *mintError
	if err != nil && !errors.As(err, &failed) {
		t.Fatalf("got the error %v (%T), want a *mintError", err, err)
	}
	return failed, e.requests.Load()
}

func TestProxyThatRefusesIsANetworkError(t *testing.T) {
	e := newEndpoint(t, says(200, goodAnswer))
	config := e.config(func(c *configEntry) { c.TokenURL = "https://mojoauth.test/oauth2/token" })
	failed, asked := mintThrough(t, config, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != "mojoauth.test:443" {
			t.Errorf("got %s %s, want CONNECT", r.Method, r.Host)
		}
		w.WriteHeader(http.StatusProxyAuthRequired)
	})
	if failed == nil || failed.class != classNetwork || !strings.Contains(failed.Error(), "the proxy answered with HTTP 407") {
		t.Errorf("got %v, want a network error with the proxy's answer", failed)
	}
	if asked != 1 {
		t.Errorf("got %d requests to the proxy", asked)
	}
}

// Unencrypted requests go directly to the loopback host.
func TestNoProxyForPlainHTTP(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "localhost", "LOCALHOST"} {
		e := newEndpoint(t, says(200, goodAnswer))
		config := e.config(func(c *configEntry) { c.TokenURL = strings.Replace(c.TokenURL, "127.0.0.1", host, 1) })
		if failed, asked := mintThrough(t, config, says(200, goodAnswer)); failed != nil || asked != 0 {
			t.Errorf("%s: the proxy got %d requests, %v", host, asked, failed)
		}
	}
}
