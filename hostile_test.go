// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// This file tests what an endpoint can do to a mint by breaking HTTP or by never
// finishing an answer.

// soon is the longest that anything immediate may take.
const soon = 10 * time.Second

// hostileEndpoint is an endpoint whose connections the test controls.
type hostileEndpoint struct {
	net.Listener
	t      *testing.T
	scheme string
	caCert string
	// ended receives a value for each connection that the client has closed.
	ended chan struct{}
}

// newHostileEndpoint serves every connection with serve, over TLS if secure. After serve
// returns, the connection stays open until the client closes it.
func newHostileEndpoint(t *testing.T, secure bool, serve func(net.Conn)) *hostileEndpoint {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &hostileEndpoint{Listener: listener, t: t, scheme: "http", ended: make(chan struct{}, 100)}
	if secure {
		cert := certificate(t)
		e.scheme, e.caCert = "https", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))
		e.Listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{cert}})
	}
	var serving sync.WaitGroup
	t.Cleanup(func() {
		e.Close()
		serving.Wait()
	})
	serving.Go(func() {
		for {
			conn, err := e.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				serve(conn)
				_, _ = io.Copy(io.Discard, conn)
				e.ended <- struct{}{}
			})
		}
	})
	return e
}

// certificate returns a self-signed certificate for 127.0.0.1.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return server.TLS.Certificates[0]
}

func (e *hostileEndpoint) config(timeout time.Duration) *configEntry {
	return &configEntry{
		TokenURL:                fmt.Sprintf("%s://%s/oauth2/token", e.scheme, e.Addr()),
		ClientID:                "client",
		ClientSecret:            canary,
		CACert:                  e.caCert,
		TokenEndpointAuthMethod: authMethodPost,
		RequestTimeout:          timeout,
	}
}

// waitUntilClosed waits until the client has closed the given number of connections.
func (e *hostileEndpoint) waitUntilClosed(connections int) {
	e.t.Helper()
	for range connections {
		select {
		case <-e.ended:
		case <-time.After(soon):
			e.t.Fatal("the client keeps a connection open")
		}
	}
}

// readRequest reads one request.
func readRequest(conn net.Conn) {
	if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
		_, _ = io.Copy(io.Discard, req.Body)
	}
}

// goodResponse is the raw bytes of an answer with a token.
var goodResponse = fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(goodAnswer), goodAnswer)

// drip writes text repeatedly, slowly, until the client closes the connection.
func drip(conn net.Conn, text string) {
	for {
		if _, err := io.WriteString(conn, text); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// hostile lists ways in which an endpoint can send no answer, or one that never ends.
var hostile = map[string]func(net.Conn){
	"nothing":            func(net.Conn) {},
	"silence":            readRequest,
	"half a status line": func(c net.Conn) { readRequest(c); _, _ = io.WriteString(c, "HTTP/1.1 2") },
	"header without end": func(c net.Conn) { readRequest(c); _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nX: "); drip(c, "x") },
	"body without end":   func(c net.Conn) { readRequest(c); _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); drip(c, " ") },
	"body that never came": func(c net.Conn) {
		readRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n")
	},
	"chunks without end": func(c net.Conn) {
		readRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		drip(c, "1\r\n \r\n")
	},
	"100 and silence": func(c net.Conn) { readRequest(c); _, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n") },
}

func TestMintEndsWhateverTheEndpointDoes(t *testing.T) {
	const allowed = 300 * time.Millisecond
	for name, serve := range hostile {
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, TLS %v", name, secure), func(t *testing.T) {
				t.Parallel()
				e := newHostileEndpoint(t, secure, serve)
				began := time.Now()
				_, failed := mintOnce(t, e.config(allowed), tokenRequest{retries: 2})
				if took := time.Since(began); took < allowed || took > allowed+soon {
					t.Errorf("took %s, want %s", took, allowed)
				}
				if failed == nil || failed.class != classTimeout {
					t.Errorf("got %v, want a timeout", failed)
				}
				e.waitUntilClosed(1)
			})
		}
	}
}

func TestMintEndsWithItsContextWhateverTheEndpointDoes(t *testing.T) {
	for name, serve := range hostile {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			e := newHostileEndpoint(t, true, func(conn net.Conn) {
				time.AfterFunc(50*time.Millisecond, cancel)
				serve(conn)
			})
			client, err := newTokenClient(e.config(maxRequestTimeout), "")
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if _, err := client.mint(ctx, tokenRequest{retries: 2}, new(testTurn)); err != context.Canceled {
				t.Errorf("got %v, want the context's own error", err)
			}
			if took := time.Since(began); took > soon {
				t.Errorf("took %s", took)
			}
			e.waitUntilClosed(1)
		})
	}
}

// An endpoint that never completes the handshake.
func TestMintEndsWithoutAHandshake(t *testing.T) {
	e := newHostileEndpoint(t, false, func(net.Conn) {})
	config := e.config(300 * time.Millisecond)
	config.TokenURL = strings.Replace(config.TokenURL, "http://", "https://", 1)
	began := time.Now()
	_, failed := mintOnce(t, config, tokenRequest{})
	if failed == nil || failed.class != classTimeout || time.Since(began) > soon {
		t.Errorf("got %v after %s, want a timeout after 300ms", failed, time.Since(began))
	}
	e.waitUntilClosed(1)
}

// A proxy that opens no tunnel and sends nothing; Go keeps waiting for it.
func TestMintEndsWithoutATunnel(t *testing.T) {
	proxy := newHostileEndpoint(t, false, readRequest)
	config := proxy.config(300 * time.Millisecond)
	config.TokenURL = "https://mojoauth.test/oauth2/token"
	settings, err := newTransport("")
	if err != nil {
		t.Fatal(err)
	}
	settings.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: proxy.Addr().String()})
	client := newTokenClientOver(config, "", func(ctx context.Context) http.RoundTripper { return mintTransport(ctx, settings) })
	began := time.Now()
	var failed *mintError
	if _, err := client.mint(t.Context(), tokenRequest{}, new(testTurn)); !errors.As(err, &failed) || failed.class != classTimeout || time.Since(began) > soon {
		t.Errorf("got %v after %s, want a timeout after 300ms", err, time.Since(began))
	}
	proxy.waitUntilClosed(1)
}

// Go's transport continues dialing for a later request after the one that needed the
// connection has left.
func TestDialingEndsWithTheMint(t *testing.T) {
	ended := make(chan struct{})
	settings, err := newTransport("")
	if err != nil {
		t.Fatal(err)
	}
	settings.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		defer close(ended)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	e := newHostileEndpoint(t, false, readRequest)
	client := newTokenClientOver(e.config(100*time.Millisecond), "", func(ctx context.Context) http.RoundTripper { return mintTransport(ctx, settings) })
	var failed *mintError
	if _, err := client.mint(t.Context(), tokenRequest{}, new(testTurn)); !errors.As(err, &failed) || failed.class != classTimeout {
		t.Errorf("got %v, want a timeout", err)
	}
	select {
	case <-ended:
	case <-time.After(soon):
		t.Error("the transport is still dialing")
	}
}

// Once an endpoint has switched protocols, Go no longer cancels a read with the context.
// So the client reads nothing, and the mint fails immediately.
func TestSwitchingProtocolsFailsAtOnce(t *testing.T) {
	for _, secure := range []bool{false, true} {
		for name, then := range map[string]func(net.Conn){
			"silence":   func(net.Conn) {},
			"more":      func(c net.Conn) { drip(c, "x") },
			"an answer": func(c net.Conn) { _, _ = io.WriteString(c, goodAnswer) },
		} {
			t.Run(fmt.Sprintf("%s, TLS %v", name, secure), func(t *testing.T) {
				t.Parallel()
				e := newHostileEndpoint(t, secure, func(conn net.Conn) {
					readRequest(conn)
					_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
					then(conn)
				})
				ended := make(chan *mintError, 1)
				go func() {
					_, failed := mintOnce(t, e.config(maxRequestTimeout), tokenRequest{retries: 2})
					ended <- failed
				}()
				select {
				case failed := <-ended:
					if failed == nil || failed.class != classUnexpected || failed.status != 101 || failed.retryable() {
						t.Errorf("got %v, want a failure of class unexpected_answer", failed)
					}
				case <-time.After(soon):
					t.Fatal("the mint is still in progress")
				}
				e.waitUntilClosed(1)
			})
		}
	}
}

func TestInterimAnswers(t *testing.T) {

	for _, c := range []struct {
		name, answers string
		status        int // of the failure; 0 when there is a token
	}{
		{"100", "HTTP/1.1 100 Continue\r\n\r\n" + goodResponse, 0},
		{"103", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + goodResponse, 0},
		{"102", "HTTP/1.1 102 Processing\r\n\r\n" + goodResponse, 102},
		{"199", "HTTP/1.1 199 Odd\r\n\r\n" + goodResponse, 199},
		{"a flood of 100", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 1000) + goodResponse, 100},
		{"a flood of 103", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000) + goodResponse, 103},
	} {
		e := newHostileEndpoint(t, false, func(conn net.Conn) {
			readRequest(conn)
			_, _ = io.WriteString(conn, c.answers)
		})
		_, failed := mintOnce(t, e.config(soon), tokenRequest{retries: 2})
		switch {
		case c.status == 0 && failed != nil:
			t.Errorf("%s: got %v, want the token after it", c.name, failed)
		case c.status != 0 && (failed == nil || failed.class != classUnexpected || failed.status != c.status):
			t.Errorf("%s: got %v, want a failure with that status", c.name, failed)
		}
		e.waitUntilClosed(1)
	}
}

// Go's standard logger prints what an endpoint sends unsolicited on an idle connection,
// perhaps the secret, and Vault logs what a plugin prints.
func TestNoIdleConnectionIsKept(t *testing.T) {
	var printed bytes.Buffer
	defer log.SetOutput(log.Writer())
	log.SetOutput(&printed)

	minted := make(chan struct{})
	e := newHostileEndpoint(t, true, func(conn net.Conn) {
		readRequest(conn)
		_, _ = io.WriteString(conn, goodResponse)
		<-minted
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nX-Unasked: "+canary+"\r\n\r\n")
	})
	client, err := newTokenClient(e.config(soon), "")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := client.mint(t.Context(), tokenRequest{}, new(testTurn)); err != nil {
			t.Fatal(err)
		}
		minted <- struct{}{}
		e.waitUntilClosed(1)
	}
	if printed.Len() > 0 {
		t.Errorf("Go's standard logger printed %q", printed.String())
	}
}

// With GODEBUG=http2debug=2, Go prints HTTP/2 frames, including the form and the Basic
// header. It reads the setting when the process starts.
func TestHTTP2DebugPrintsNoSecret(t *testing.T) {
	const inChild = "MOJOAUTH_TEST_MINTS_IN_CHILD"
	if os.Getenv(inChild) == "" {
		child := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		child.Env = append(os.Environ(), inChild+"=1", "GODEBUG=http2debug=2")
		printed, err := child.CombinedOutput()
		if err != nil || !bytes.Contains(printed, []byte("minted over HTTP/")) {
			t.Fatalf("%v: %s", err, printed)
		}
		for line := range bytes.Lines(printed) {
			if bytes.Contains(line, []byte(canary)) || bytes.Contains(line, []byte("authorization")) {
				t.Errorf("the process printed: %s", line)
			}
		}
		return
	}
	protocol := ""
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocol = r.Proto
		says(200, goodAnswer)(w, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for _, method := range []string{authMethodPost, authMethodBasic} {
		config := (&endpoint{Server: server}).config(func(c *configEntry) {
			c.TokenEndpointAuthMethod = method
			c.CACert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
		})
		if _, failed := mintOnce(t, config, tokenRequest{}); failed != nil {
			t.Fatal(failed)
		}
	}
	t.Logf("minted over %s", protocol)
}

// A certificate may contain a thousand names with any text in them; so may anything that
// is not HTTP.
func TestConnectionErrorsQuoteNothingFromTheServer(t *testing.T) {
	const text = "words-of-the-server.example"
	names := &x509.Certificate{DNSNames: slices.Repeat([]string{text}, 1000)}
	invalid := func(reason x509.InvalidReason) error {
		return x509.CertificateInvalidError{Cert: names, Reason: reason, Detail: text}
	}
	for _, c := range []struct {
		name string
		err  error
		tls  bool
		want string
	}{
		{"another name", x509.HostnameError{Certificate: names, Host: "h"}, true, "a different host"},
		{"expired", invalid(x509.Expired), true, "expired"},
		{"name constraints", invalid(x509.CANotAuthorizedForThisName), true, "may not issue it"},
		{"another usage", invalid(x509.IncompatibleUsage), true, "was not issued for a server"},
		{"an unknown reason", invalid(99), true, "not valid"},
		{"unknown", &tls.CertificateVerificationError{Err: errors.New(text)}, true, "could not be verified"},
		{"unreadable", errors.New("tls: failed to parse certificate from server: " + text), true, "handshake failed"},
		{"alert", &net.OpError{Op: "remote error", Err: tls.AlertError(40)}, true, "handshake failure"},
		{"no dial", &net.OpError{Op: "dial", Err: errors.New(text)}, false, "connection broke"},
		{"no HTTP", fmt.Errorf("net/http: malformed HTTP response %q", text), false, "connection broke"},
	} {
		failed := noConnection(&url.Error{Op: "Post", URL: "https://" + text, Err: c.err})
		if got := failed.Error(); strings.Contains(got, text) || !strings.Contains(got, c.want) || len(got) > 200 {
			t.Errorf("%s: got %q, want %q and nothing from the server", c.name, got, c.want)
		}
		if (failed.class == classTLS) != c.tls || failed.retryable() == c.tls {
			t.Errorf("%s: got class %s, retryable %v", c.name, failed.class, failed.retryable())
		}
	}
}
