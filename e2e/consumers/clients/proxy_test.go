// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package clients

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// exchange is a request to a server and the response.
type exchange struct {
	at     time.Time
	method string
	path   string
	query  url.Values
	bearer string
	status int
	body   []byte
}

// token is the part of Vault's response to a read that the tests use.
type token struct {
	LeaseDuration int      `json:"lease_duration"`
	Warnings      []string `json:"warnings"`
	Data          struct {
		AccessToken       string `json:"access_token"`
		LastVaultRotation string `json:"last_vault_rotation"`
		TTL               int    `json:"ttl"`
	} `json:"data"`
}

func (e exchange) token() (answer token) {
	_ = json.Unmarshal(e.body, &answer)
	return answer
}

// recordingProxy is a reverse proxy that records requests and responses.
type recordingProxy struct {
	*httptest.Server
	mu        sync.Mutex
	exchanges []exchange
}

// newProxy starts a proxy that sends all requests to target. If intercept is not nil, the
// proxy calls it with the number of each request, and forwards the request if intercept
// returns false. ca is the file with the CA certificate for the target, if it needs one.
func newProxy(t testing.TB, target, ca string, intercept func(n int, w http.ResponseWriter, r *http.Request) bool) *recordingProxy {
	t.Helper()
	to, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		if to.Path != "" {
			r.Out.URL.Path = to.Path
		}
	}}
	f := &recordingProxy{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		n := len(f.exchanges)
		f.exchanges = append(f.exchanges, exchange{
			at: time.Now(), method: r.Method, path: r.URL.Path, query: r.URL.Query(),
			bearer: strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "),
		})
		f.mu.Unlock()
		answer := &answerRecorder{ResponseWriter: w, status: http.StatusOK}
		if intercept == nil || !intercept(n+1, answer, r) {
			proxy.ServeHTTP(answer, r)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.exchanges[n].status, f.exchanges[n].body = answer.status, answer.body.Bytes()
	}))
	t.Cleanup(f.Close)
	return f
}

// answerRecorder keeps a copy of a response.
type answerRecorder struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (a *answerRecorder) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

func (a *answerRecorder) Write(p []byte) (int, error) {
	a.body.Write(p)
	return a.ResponseWriter.Write(p)
}

// reads returns the reads of creds so far, in order.
func (f *recordingProxy) reads() []exchange {
	return slices.DeleteFunc(f.all(), func(e exchange) bool { return !strings.HasPrefix(e.path, "/v1/mojoauth/creds/") })
}

// all returns the exchanges so far, in order.
func (f *recordingProxy) all() []exchange {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.exchanges)
}

// refuseFirst refuses the first token that it sees, as an API does after revoking it.
func refuseFirst() func(n int, w http.ResponseWriter, r *http.Request) bool {
	var mu sync.Mutex
	var revoked string
	return func(_ int, w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		sent := r.Header.Get("Authorization")
		if revoked == "" {
			revoked = sent
		}
		if sent != revoked {
			return false
		}
		http.Error(w, "revoked", http.StatusUnauthorized)
		return true
	}
}

// fail writes a Vault error response.
func fail(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, `{"errors":["not now"]}`)
}
