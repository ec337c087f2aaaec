// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/redact"
)

// This file requests one token from MojoAuth. From the outside in:
//
//	mint                waits for its turn, and starts over after a 429
//	tries               retries until there is a token, no more hope, or no more time
//	clientcredentials   speaks the protocol (RFC 6749 §4.4)
//	try                 sends one request and reads its complete, bounded answer
//	mintTransport       opens connections that close with the mint
//
// answer.go interprets the answer. Nothing here knows about the cache or Vault.

const (
	// The pause before a retry within one mint doubles from shortestPause to
	// longestPause, with jitter.
	shortestPause = 250 * time.Millisecond
	longestPause  = 2 * time.Second

	// maxInterim bounds the interim responses before the final one.
	maxInterim = 5
)

// tokenRequest has the parameters of a mint.
type tokenRequest struct {
	audience string            // omitted if empty
	scopes   []string          // omitted if empty
	extra    map[string]string // additional form parameters
	retries  int               // retries after the first request
}

// tokenClient requests tokens from the token endpoint of one config. It is safe for
// concurrent use.
type tokenClient struct {
	config    *configEntry
	userAgent string // may be empty
	secrets   *redact.Redactor
	random    func() float64 // jitter, uniform in [0, 1)

	// transport returns the transport for the requests of one mint. Its connections are
	// closed when ctx ends.
	transport func(ctx context.Context) http.RoundTripper
}

// newTokenClient returns a client for the config, which must be valid.
func newTokenClient(config *configEntry, userAgent string) (*tokenClient, error) {
	settings, err := newTransport(config.CACert)
	if err != nil {
		return nil, err
	}
	return newTokenClientOver(config, userAgent, func(ctx context.Context) http.RoundTripper {
		return mintTransport(ctx, settings)
	}), nil
}

func newTokenClientOver(config *configEntry, userAgent string, transport func(context.Context) http.RoundTripper) *tokenClient {
	return &tokenClient{
		config:    config,
		userAgent: userAgent,
		secrets:   redact.New(config.ClientSecret, forwardingTexts...),
		random:    rand.Float64,
		transport: transport,
	}
}

// departures decides when the requests of one mint may leave.
type departures interface {
	// wait waits until a request may leave. Its error says why none will.
	wait(ctx context.Context) error
	// answered reports the result of the request that left last, and the Retry-After of
	// its answer, or 0.
	answered(how gate.Answer, retryAfter time.Duration)
}

// mint requests one token and waits for it. A throttled request waits for its turn again,
// as if it had not left. The error is a *mintError, the error of leave.wait, or that of
// ctx.
func (c *tokenClient) mint(ctx context.Context, req tokenRequest, leave departures) (*token, error) {
	for {
		if err := leave.wait(ctx); err != nil {
			return nil, err
		}
		tok, failed := c.tries(ctx, req, leave)
		switch {
		case failed == nil:
			return tok, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !failed.throttled():
			return nil, failed
		}
	}
}

// tries sends a request, and retries it after temporary failures, for request_timeout at
// most.
func (c *tokenClient) tries(ctx context.Context, req tokenRequest, leave departures) (*token, *mintError) {
	deadline := time.Now().Add(c.config.RequestTimeout)
	timed, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	transport := c.transport(timed)

	var before *mintError // why the previous try failed
	for tries := 1; ; tries++ {
		tok, failed := c.try(timed, transport, req)
		leave.answered(failed.answer())
		switch {
		case failed == nil:
			return tok, nil
		case failed.status == 0 && !time.Now().Before(deadline):
			return nil, c.outOfTime(before)
		case !failed.retryable() || tries > req.retries:
			return nil, failed
		}
		if !c.pause(timed, tries) || leave.wait(timed) != nil {
			return nil, failed
		}
		before = failed
	}
}

// outOfTime returns the failure of a mint that ran out of time during a try: that of the
// previous try if it got an answer, and a timeout otherwise.
func (c *tokenClient) outOfTime(before *mintError) *mintError {
	if before != nil && before.status != 0 {
		return before
	}
	return &mintError{class: classTimeout, allowed: c.config.RequestTimeout}
}

// pause waits before the next try, and reports whether there is time for one. The wait
// doubles from try to try. A random part, up to half, is subtracted, so nodes that failed
// together do not retry together.
func (c *tokenClient) pause(ctx context.Context, tries int) bool {
	longest := min(longestPause, shortestPause<<min(tries-1, 10))
	wait := longest/2 + lifetime.Share(longest/2, c.random())
	// A pause that does not fit would only waste the reader's time.
	if deadline, ok := ctx.Deadline(); ok && time.Now().Add(wait).After(deadline) {
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return true
}

// try sends one request.
func (c *tokenClient) try(ctx context.Context, transport http.RoundTripper, req tokenRequest) (*token, *mintError) {
	t := &try{client: c, transport: transport}
	via := context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Transport: t})
	if _, err := c.protocol(req).Token(via); err != nil {
		return nil, noConnection(err)
	}
	t.token.scope = cmp.Or(t.token.scope, joinScopes(req.scopes))
	return t.token, nil
}

// protocol returns the client credentials grant for this request. For client_secret_basic,
// x/oauth2 form-encodes the credentials first, as RFC 6749 §2.3.1 requires.
func (c *tokenClient) protocol(req tokenRequest) *clientcredentials.Config {
	params := url.Values{}
	for name, value := range req.extra {
		params.Set(name, value)
	}
	if req.audience != "" {
		params.Set("audience", req.audience)
	}
	style := oauth2.AuthStyleInParams
	if c.config.TokenEndpointAuthMethod == authMethodBasic {
		style = oauth2.AuthStyleInHeader
	}
	return &clientcredentials.Config{
		ClientID:       c.config.ClientID,
		ClientSecret:   c.config.ClientSecret,
		TokenURL:       c.config.TokenURL,
		Scopes:         req.scopes,
		EndpointParams: params,
		AuthStyle:      style,
	}
}

// try is one request to the token endpoint: the http.RoundTripper that x/oauth2 sends it
// through, and the token in the answer. It returns only a token or a *mintError, so no
// response body or redirect leaves it.
type try struct {
	client    *tokenClient
	transport http.RoundTripper
	token     *token
}

func (t *try) RoundTrip(req *http.Request) (*http.Response, error) {
	a, err := t.send(req)
	if err != nil {
		return nil, noConnection(err)
	}
	tok, failed := readAnswer(a, t.client.secrets)
	if failed != nil {
		return nil, failed
	}
	t.token = tok
	return plainAnswer(req, tok)
}

// send sends the request and reads the complete answer, so a connection that breaks in the
// middle of the body counts as a failed request and can be retried.
func (t *try) send(req *http.Request) (*answer, error) {
	req = req.Clone(httptrace.WithClientTrace(req.Context(), interimTrace()))
	req.Header.Set("Accept", "application/json")
	if t.client.userAgent != "" {
		req.Header.Set("User-Agent", t.client.userAgent)
	}
	sentAt := time.Now()
	resp, err := t.transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	a := &answer{status: resp.StatusCode, header: resp.Header, sentAt: sentAt}
	if a.status != http.StatusSwitchingProtocols { // whose body is the raw connection
		// Go's transport has already decompressed gzip, so this bounds the size in
		// memory.
		a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	}
	a.receivedAt = time.Now()
	return a, err
}

// interimTrace allows the interim responses 100 Continue and 103 Early Hints, up to
// maxInterim of them: Go no longer counts them if there is a trace.
func interimTrace() *httptrace.ClientTrace {
	seen := 0
	return &httptrace.ClientTrace{Got1xxResponse: func(status int, _ textproto.MIMEHeader) error {
		seen++
		if status != http.StatusContinue && status != http.StatusEarlyHints || seen > maxInterim {
			return (&answer{status: status}).failure(classUnexpected, interimStatus)
		}
		return nil
	}}
}

// plainAnswer returns a response in the form that x/oauth2 expects, whatever form
// MojoAuth's had. The other fields have been read already.
func plainAnswer(req *http.Request, tok *token) (*http.Response, error) {
	body, err := json.Marshal(map[string]string{"access_token": tok.accessToken})
	if err != nil {
		return nil, err
	}
	return &http.Response{
		Status:        "200 OK",
		StatusCode:    http.StatusOK,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        http.Header{"Content-Type": {"application/json"}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       req,
	}, nil
}

// newTransport returns the settings for all connections to one token endpoint. It trusts
// the authorities in caCert in addition to the system's.
func newTransport(caCert string) (*http.Transport, error) {
	// Each connection carries one request: Go's standard logger would print what an
	// endpoint sends on an idle connection.
	transport := cleanhttp.DefaultTransport()
	transport.MaxResponseHeaderBytes = maxAnswerBytes
	transport.Proxy = proxyFor(http.ProxyFromEnvironment)
	transport.OnProxyConnectResponse = refusedByProxy
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if caCert != "" {
		roots, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("reading the system's certificate authorities: %w", err)
		}
		roots.AppendCertsFromPEM([]byte(caCert))
		transport.TLSClientConfig.RootCAs = roots
	}
	// HTTP/2 is off: with GODEBUG=http2debug=2, Go would print the secret.
	transport.ForceAttemptHTTP2 = false
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	return transport, nil
}

// mintTransport returns the transport of one mint. It closes its connections when ctx ends.
// Go's own transport does not: it continues to dial, and after a 101 response, only closing
// the connection ends a read.
func mintTransport(ctx context.Context, settings *http.Transport) *http.Transport {
	transport := settings.Clone()
	transport.DialContext = func(_ context.Context, network, address string) (net.Conn, error) {
		conn, err := settings.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		context.AfterFunc(ctx, func() { _ = conn.Close() })
		return conn, nil
	}
	return transport
}

// proxyFor uses a proxy for https only, where it sees nothing but the host's name. Plain
// http goes to a loopback host, directly. Go's own exception for loopback hosts does not
// cover LOCALHOST in capitals.
func proxyFor(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(req *http.Request) (*url.URL, error) {
		if req.URL.Scheme != "https" {
			return nil, nil
		}
		return proxy(req)
	}
}

// refusedByProxy reports that a proxy opened no tunnel. The error of http.Transport has
// only the text of the status.
func refusedByProxy(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
	if answer.StatusCode == http.StatusOK {
		return nil
	}
	return &mintError{class: classNetwork, reason: fmt.Sprintf("the proxy answered with HTTP %d", answer.StatusCode)}
}
