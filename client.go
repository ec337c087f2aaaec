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

// This file asks MojoAuth for one token. From the outside in:
//
//	mint                waits for its turn, and starts again after a 429
//	tries               until one brings a token or there is no use or time
//	clientcredentials   the protocol (RFC 6749 §4.4)
//	try                 one request and its whole, bounded answer
//	mintTransport       connections that end with the mint
//
// answer.go says what an answer means; nothing here knows a cache or Vault.

const (
	// The pause before a further try within one mint doubles from shortestPause
	// to longestPause, and is jittered.
	shortestPause = 250 * time.Millisecond
	longestPause  = 2 * time.Second

	// maxInterim bounds how many interim answers come before the one that counts.
	maxInterim = 5
)

// tokenRequest is what one token is asked for.
type tokenRequest struct {
	audience string            // omitted when empty
	scopes   []string          // omitted when empty
	extra    map[string]string // further form fields
	retries  int               // tries after the first; 0 for none
}

// tokenClient asks the token endpoint of one config for tokens. It is safe for
// concurrent use.
type tokenClient struct {
	config    *configEntry
	userAgent string // may be empty
	secrets   *redact.Redactor
	random    func() float64 // jitter, uniform in [0, 1)

	// transport makes what the requests of one mint go through. What it opens is
	// closed when ctx ends.
	transport func(ctx context.Context) http.RoundTripper
}

// newTokenClient prepares a client for the config, which must be valid.
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

// departures is where the requests of one mint wait until they may leave.
type departures interface {
	// wait returns when a request may leave, or why none will.
	wait(ctx context.Context) error
	// answered tells what came of the request that left last, and the Retry-After
	// of its answer if there was one.
	answered(how gate.Answer, retryAfter time.Duration)
}

// mint asks for one token and waits for it. A request that is throttled waits for its
// turn again, as if it had not left. The error is a *mintError, one of wait, or the
// end of ctx, as it is.
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

// tries asks, now and again after failures that may pass, for at most the config's
// request_timeout.
func (c *tokenClient) tries(ctx context.Context, req tokenRequest, leave departures) (*token, *mintError) {
	deadline := time.Now().Add(c.config.RequestTimeout)
	timed, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	transport := c.transport(timed)

	var before *mintError // why the last try failed
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

// outOfTime is the failure of a mint whose last try was still waiting when the
// time was over: an answer that came before, or else that there was none.
func (c *tokenClient) outOfTime(before *mintError) *mintError {
	if before != nil && before.status != 0 {
		return before
	}
	return &mintError{class: classTimeout, allowed: c.config.RequestTimeout}
}

// pause waits before the next try, and reports whether there is time for one. The
// wait doubles, and a random half of it is taken off, so that nodes that failed
// together do not return together.
func (c *tokenClient) pause(ctx context.Context, tries int) bool {
	longest := min(longestPause, shortestPause<<min(tries-1, 10))
	wait := longest/2 + lifetime.Share(longest/2, c.random())
	// A pause that does not fit would only spend the reader's time.
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

// try asks once.
func (c *tokenClient) try(ctx context.Context, transport http.RoundTripper, req tokenRequest) (*token, *mintError) {
	t := &try{client: c, transport: transport}
	via := context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Transport: t})
	if _, err := c.protocol(req).Token(via); err != nil {
		return nil, noConnection(err)
	}
	t.token.scope = cmp.Or(t.token.scope, joinScopes(req.scopes))
	return t.token, nil
}

// protocol is the client credentials grant for this request. Credentials sent
// by client_secret_basic are form-encoded first, as RFC 6749 §2.3.1 wants;
// x/oauth2 sees to that.
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

// try is one request to the token endpoint: the http.RoundTripper that x/oauth2
// sends it through, and the token that came back. All that leaves it is a token or
// a *mintError, so that no body and no redirect reaches anybody.
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

// send sends the request and reads the answer whole, so that a connection lost
// in the middle of a body counts as a failed request, and can be tried again.
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
	if a.status != http.StatusSwitchingProtocols { // there the body is the bare connection
		// Go's transport has undone a gzip encoding, so the bound holds for what
		// the body would be in memory.
		a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	}
	a.receivedAt = time.Now()
	return a, err
}

// interimTrace lets interim answers pass that mean nothing (100 Continue and 103
// Early Hints), a few of them: it is Go's rule that who looks at them counts them.
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

// plainAnswer is an answer as x/oauth2 wants it, whatever MojoAuth's looked like.
// What it holds beside the token has been read already.
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

// newTransport makes the settings of all connections to one token endpoint, whose
// certificate may also be signed by the authorities in caCert.
func newTransport(caCert string) (*http.Transport, error) {
	// One request to a connection: what an endpoint sends unasked while none is
	// under way, Go's standard logger would print.
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
	// No HTTP/2: with GODEBUG=http2debug=2, Go would print the secret.
	transport.ForceAttemptHTTP2 = false
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	return transport, nil
}

// mintTransport makes the transport of one mint, whose connections are closed when
// ctx ends. Of Go's own transport that is not true: it goes on dialing, and once an
// endpoint has answered HTTP 101, nothing but a closed connection ends a read.
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

// proxyFor asks for a proxy where it gets to see nothing but the host's name: for
// https. Plain http goes to a loopback host and to nobody else; Go's own exception for
// these does not know LOCALHOST.
func proxyFor(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(req *http.Request) (*url.URL, error) {
		if req.URL.Scheme != "https" {
			return nil, nil
		}
		return proxy(req)
	}
}

// refusedByProxy says that a proxy opened no tunnel: http.Transport's own error is
// only the words of the status.
func refusedByProxy(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
	if answer.StatusCode == http.StatusOK {
		return nil
	}
	return &mintError{class: classNetwork, reason: fmt.Sprintf("the proxy of this host answered HTTP %d", answer.StatusCode)}
}
