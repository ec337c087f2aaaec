// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/hashicorp/go-retryablehttp"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// This file asks MojoAuth for one token. From the outside in, a request passes
//
//	clientcredentials   the protocol (RFC 6749 §4.4)
//	answerReader        failures become mintErrors, tokens one plain shape
//	retryablehttp       tries again what may pass
//	wire                one request and its whole, bounded answer
//	cleanhttp           connections and TLS
//
// answer.go says what an answer means; nothing here knows a cache or Vault.

const (
	// maxAnswerBytes bounds the body and, separately, the header of an answer.
	maxAnswerBytes = 64 << 10

	// The pause before a further try within one mint doubles from retryWaitMin
	// to retryWaitMax, and is jittered.
	retryWaitMin = 250 * time.Millisecond
	retryWaitMax = 2 * time.Second
)

// tokenRequest is what one token is asked for.
type tokenRequest struct {
	audience string            // omitted when empty
	scopes   []string          // omitted when empty
	extra    map[string]string // further form fields
	retries  int               // tries after the first; 0 for none
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

// tokenClient asks the token endpoint of one config for tokens. It is safe for
// concurrent use.
type tokenClient struct {
	config    *configEntry
	http      *http.Client
	transport *http.Transport // nil in tests that bring their own
	redact    redactor
	timeout   time.Duration
}

// newTokenClient prepares a client for the config, which must be valid.
// userAgent may be empty.
func newTokenClient(config *configEntry, userAgent string) (*tokenClient, error) {
	transport := cleanhttp.DefaultPooledTransport()
	transport.MaxResponseHeaderBytes = maxAnswerBytes
	transport.Proxy = proxyFor(http.ProxyFromEnvironment)
	transport.OnProxyConnectResponse = refusedByProxy
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if config.CACert != "" {
		roots, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("reading the system's certificate authorities: %w", err)
		}
		roots.AppendCertsFromPEM([]byte(config.CACert))
		transport.TLSClientConfig.RootCAs = roots
	}
	c := newTokenClientOver(config, &wire{next: transport, userAgent: userAgent})
	c.transport = transport
	return c, nil
}

// newTokenClientOver builds the client on something else than TCP, for tests.
func newTokenClientOver(config *configEntry, next http.RoundTripper) *tokenClient {
	retrying := &retryablehttp.Client{
		HTTPClient:   &http.Client{Transport: next, CheckRedirect: refuseRedirect},
		RetryWaitMin: retryWaitMin,
		RetryWaitMax: retryWaitMax,
		RetryMax:     maxMaxRetries, // checkRetry decides by the request's own number
		CheckRetry:   checkRetry,
		Backoff:      retryWait,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	reader := &answerReader{next: &retryablehttp.RoundTripper{Client: retrying}}
	return &tokenClient{
		config:  config,
		http:    &http.Client{Transport: reader, CheckRedirect: refuseRedirect},
		redact:  newRedactor(config.ClientID, config.ClientSecret),
		timeout: config.RequestTimeout,
	}
}

// close drops idle connections.
func (c *tokenClient) close() {
	if c.transport != nil {
		c.transport.CloseIdleConnections()
	}
}

// mint asks for one token and waits for it, at most the config's
// request_timeout with all tries. Any error is a *mintError, but for the end of
// ctx, which is returned as it is.
func (c *tokenClient) mint(ctx context.Context, req tokenRequest) (*token, error) {
	ex := &exchange{retries: req.retries, redact: c.redact}
	timed, cancel := context.WithTimeout(context.WithValue(ctx, exchangeKey{}, ex), c.timeout)
	defer cancel()

	tok, err := c.protocol(req).Token(context.WithValue(timed, oauth2.HTTPClient, c.http))
	switch {
	case err == nil:
		return c.granted(tok, req, ex)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	var failed *mintError
	if errors.As(err, &failed) {
		return nil, failed
	}
	if timed.Err() != nil {
		// What failed before counts, unless the last try was still waiting for an
		// answer and there was none before.
		if ex.failed != nil && (ex.failed.status != 0 || !ex.trying) {
			return nil, ex.failed
		}
		return nil, &mintError{class: classTimeout, allowed: c.timeout}
	}
	return nil, classifyTransport(err)
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

// granted turns the protocol's token into ours.
func (c *tokenClient) granted(tok *oauth2.Token, req tokenRequest, ex *exchange) (*token, error) {
	expiresIn, _ := tok.Extra("expires_in").(float64)
	told := toldLifetime(time.Duration(expiresIn)*time.Second, tok.AccessToken, ex.sentAt)
	if told < 0 {
		return nil, &mintError{
			class:  classUnexpected,
			status: ex.status,
			reason: "the token's exp claim had already passed when the token was asked for; compare the clocks of this host and MojoAuth",
		}
	}
	scope, _ := tok.Extra("scope").(string)
	if scope == "" {
		scope = joinScopes(req.scopes)
	}
	return &token{
		accessToken: tok.AccessToken,
		tokenType:   tok.Type(),
		scope:       scope,
		mintedAt:    ex.sentAt,
		told:        told,
	}, nil
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

// refuseRedirect makes a redirect an answer in itself: a 307 or 308 would send
// the client secret to wherever it points.
func refuseRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// exchange is what the layers of one mint tell each other. One goroutine at a
// time works on a mint, so that it needs no lock.
type exchange struct {
	redact  redactor
	retries int        // tries after the first that are allowed
	tries   int        // tries made
	trying  bool       // a try is under way, or was when the time was over
	sentAt  time.Time  // when the last try was sent
	status  int        // of the answer that had the token
	failed  *mintError // why the last try that ended in time failed
}

type exchangeKey struct{}

func exchangeFrom(ctx context.Context) *exchange {
	if ex, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
		return ex
	}
	return &exchange{}
}

// wire sends one request and reads the answer whole, so that a connection lost
// in the middle of a body counts as a failed request, and can be tried again.
type wire struct {
	next      http.RoundTripper
	userAgent string
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	ex := exchangeFrom(req.Context())
	ex.tries++
	ex.trying = true
	ex.sentAt = time.Now()

	req = req.Clone(req.Context())
	req.Header.Set("Accept", "application/json")
	if w.userAgent != "" {
		req.Header.Set("User-Agent", w.userAgent)
	}
	resp, err := w.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	// Go's transport has undone a gzip encoding, so the bound holds for what
	// the body would be in memory.
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return nil, err
	}
	resp.Body = &wholeBody{Reader: bytes.NewReader(body), bytes: body}
	resp.ContentLength = int64(len(body))
	return resp, nil
}

// wholeBody is a response body that is in memory already.
type wholeBody struct {
	*bytes.Reader
	bytes []byte
}

func (*wholeBody) Close() error { return nil }

// wholeAnswer is the answer that wire read.
func wholeAnswer(resp *http.Response) answer {
	a := answer{status: resp.StatusCode, header: resp.Header, receivedAt: time.Now()}
	if body, ok := resp.Body.(*wholeBody); ok {
		a.body = body.bytes
	}
	return a
}

// checkRetry tells whether a further try may help: retryablehttp.CheckRetry.
func checkRetry(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	ex := exchangeFrom(ctx)
	ex.trying = false
	var failed *mintError
	if err != nil {
		failed = classifyTransport(err)
	} else {
		_, failed = readAnswer(wholeAnswer(resp), ex.sentAt, ex.redact)
	}
	ex.failed = failed
	if failed == nil || !failed.retryable() || ex.tries > ex.retries {
		return false, nil
	}
	// A pause that does not fit would only spend the caller's time.
	if deadline, ok := ctx.Deadline(); ok && time.Now().Add(failed.retryAfter).After(deadline) {
		return false, nil
	}
	return true, nil
}

// retryWait is the pause before the next try: retryablehttp.Backoff. What the
// server asks for by Retry-After counts, else a doubling wait of which a random
// half is taken off, so that nodes that failed together do not return together.
func retryWait(shortest, longest time.Duration, attempt int, resp *http.Response) time.Duration {
	if resp != nil {
		if wait := retryAfter(resp.Header, time.Now()); wait > 0 {
			return wait
		}
	}
	wait := min(longest, shortest<<min(attempt, 10))
	return wait/2 + rand.N(wait/2)
}

// answerReader reads what came back after all tries, for the protocol above:
// a failure leaves as a *mintError, which holds no body; a token in the plain
// shape that x/oauth2 reads, whatever shape MojoAuth gave it.
type answerReader struct {
	next http.RoundTripper
}

func (r *answerReader) RoundTrip(req *http.Request) (*http.Response, error) {
	ex := exchangeFrom(req.Context())
	resp, err := r.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	granted, failed := readAnswer(wholeAnswer(resp), ex.sentAt, ex.redact)
	if failed != nil {
		return nil, failed
	}
	ex.status = resp.StatusCode
	body := granted.json()
	return &http.Response{
		Status:        strconv.Itoa(http.StatusOK) + " " + http.StatusText(http.StatusOK),
		StatusCode:    http.StatusOK,
		Proto:         resp.Proto,
		ProtoMajor:    resp.ProtoMajor,
		ProtoMinor:    resp.ProtoMinor,
		Header:        http.Header{"Content-Type": {"application/json"}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       req,
	}, nil
}
