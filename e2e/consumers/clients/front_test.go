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

// exchange is a request to a server, and its answer.
type exchange struct {
	at     time.Time
	method string
	path   string
	query  url.Values
	bearer string
	status int
	body   []byte
}

// token is the part of Vault's answer to a read that the tests look at.
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

// front stands in front of a server, and remembers what passes.
type front struct {
	*httptest.Server
	mu        sync.Mutex
	exchanges []exchange
}

// newFront starts one, whose requests all go to target. intercept sees the number of each
// request, and answers it or lets it pass. ca is the file of who signed the target's
// certificate.
func newFront(t testing.TB, target, ca string, intercept func(n int, w http.ResponseWriter, r *http.Request) bool) *front {
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
	f := &front{}
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

// answerRecorder keeps a copy of an answer.
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

// reads are the reads of creds so far, in order.
func (f *front) reads() []exchange {
	return slices.DeleteFunc(f.all(), func(e exchange) bool { return !strings.HasPrefix(e.path, "/v1/mojoauth/creds/") })
}

// all are the exchanges so far, in order.
func (f *front) all() []exchange {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.exchanges)
}

// refuseFirst refuses the first token that it sees, as an API does that has revoked it.
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

// fail answers as a Vault that cannot serve.
func fail(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, `{"errors":["not now"]}`)
}
