// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Token endpoints, and servers in front of them, with behavior that no HTTP library
// offers. All listen on loopback and stop with the test.

// rawEndpoint is an endpoint that serves raw connections.
type rawEndpoint struct {
	address  string
	requests atomic.Int64
}

func (e *rawEndpoint) tokenURL() string { return "http://" + e.address + "/oauth2/token" }

// startRaw starts an endpoint that passes each request to answer, with its connection and
// body. The endpoint closes the connection when answer returns false.
func startRaw(t testing.TB, answer func(conn net.Conn, body []byte) (more bool)) *rawEndpoint {
	t.Helper()
	e := new(rawEndpoint)
	e.address = accept(t, func(conn net.Conn) {
		reader := bufio.NewReader(conn)
		for {
			req, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			e.requests.Add(1)
			if !answer(conn, body) {
				return
			}
		}
	})
	return e
}

// accept serves connections until the test ends, and returns its address.
func accept(t testing.TB, serve func(net.Conn)) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	ended := false
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			if ended {
				mu.Unlock()
				conn.Close()
				return
			}
			open[conn] = true
			serving.Go(func() {
				serve(conn)
				conn.Close()
				mu.Lock()
				defer mu.Unlock()
				delete(open, conn)
			})
			mu.Unlock()
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		ended = true
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return listener.Addr().String()
}

// untilClosed waits until the peer has closed the connection.
func untilClosed(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// switching answers 101 and then sends nothing. From then on, Go's client has a raw
// connection, where the request's deadline does not end a read.
func switching(t testing.TB) *rawEndpoint {
	return startRaw(t, func(conn net.Conn, _ []byte) bool {
		_, _ = fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: silence\r\n\r\n")
		untilClosed(conn)
		return false
	})
}

// dripping answers with an endless body, one byte at a time.
func dripping(t testing.TB) *rawEndpoint {
	return startRaw(t, func(conn net.Conn, _ []byte) bool {
		_, _ = fmt.Fprint(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n")
		for {
			if _, err := fmt.Fprint(conn, " "); err != nil {
				return false
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
}

// silent accepts requests and never answers.
func silent(t testing.TB) *rawEndpoint {
	return startRaw(t, func(conn net.Conn, _ []byte) bool { untilClosed(conn); return false })
}

// blurting grants tokens. After each one, it sends what it received on the now idle
// connection, unsolicited. ended receives a value for each connection that the peer has
// closed.
func blurting(t testing.TB) (endpoint *rawEndpoint, ended <-chan struct{}) {
	closed := make(chan struct{}, 16)
	var serial atomic.Int64
	return startRaw(t, func(conn net.Conn, body []byte) bool {
		answer := fmt.Sprintf(`{"access_token":"blurted-%d","token_type":"Bearer","expires_in":3600}`, serial.Add(1))
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(answer), answer)
		time.Sleep(200 * time.Millisecond) // until the answer is read: the text must arrive on an idle connection
		form, _ := url.ParseQuery(string(body))
		fmt.Fprintf(conn, "%s is what you sent me\r\n", form.Get("client_secret"))
		untilClosed(conn)
		closed <- struct{}{}
		return false
	}), closed
}

// router is an https proxy that decides which server answers for a host, as someone who
// controls DNS does.
type router struct {
	url string

	mu     sync.Mutex
	routes map[string]string // addresses by host
	others string            // the address for all other hosts
}

func startRouter(t testing.TB) *router {
	t.Helper()
	r := &router{routes: map[string]string{}}
	r.url = "http://" + accept(t, func(conn net.Conn) {
		reader := bufio.NewReader(conn)
		req, err := http.ReadRequest(reader)
		if err != nil || req.Method != http.MethodConnect {
			return
		}
		host, _, _ := net.SplitHostPort(req.Host)
		r.mu.Lock()
		to := r.routes[host]
		if to == "" {
			to = r.others
		}
		r.mu.Unlock()
		behind, err := net.Dial("tcp", to)
		if err != nil {
			_, _ = fmt.Fprint(conn, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		defer behind.Close()
		_, _ = fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\n")
		go func() {
			_, _ = io.Copy(behind, reader)
			behind.Close()
		}()
		_, _ = io.Copy(conn, behind)
	})
	return r
}

// route makes a server answer for a host, or with "" for all hosts without a route.
func (r *router) route(host string, server *oauthserver.Server) {
	address := strings.TrimPrefix(server.URL(), "https://")
	r.mu.Lock()
	defer r.mu.Unlock()
	if host == "" {
		r.others = address
		return
	}
	r.routes[host] = address
}

// startHTTP2 starts HTTP/2 in front of an OAuth server, and returns its token URL.
func startHTTP2(t testing.TB, ca *harness.Authority, behind *oauthserver.Server) (tokenURL string) {
	t.Helper()
	return "https://" + serve(t, behind, &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{ca.Issue(t, "127.0.0.1", time.Now().Add(time.Hour))},
		NextProtos:   []string{"h2", "http/1.1"},
	}) + oauthserver.TokenPath
}

// serve serves HTTP until the test ends, with TLS if configured, and returns its address.
func serve(t testing.TB, handler http.Handler, config *tls.Config) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute, TLSConfig: config}
	served := make(chan error, 1)
	go func() {
		if config != nil {
			served <- server.ServeTLS(listener, "", "")
			return
		}
		served <- server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// firewall is in front of an OAuth server and answers some requests itself: those for a
// blocked audience with 403, and long ones with 413.
type firewall struct {
	url     string
	refused atomic.Int64
}

const (
	forbiddenAudience = "https://forbidden.example.org/"
	firewallBytes     = 2 << 10
)

func startFirewall(t testing.TB, behind *oauthserver.Server) *firewall {
	t.Helper()
	f := new(firewall)
	f.url = "http://" + serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		form, err := url.ParseQuery(string(body))
		switch {
		case err != nil:
			http.Error(w, "<html>Bad Request", http.StatusBadRequest)
		case len(body) > firewallBytes:
			f.refused.Add(1)
			http.Error(w, "<html>Request Entity Too Large", http.StatusRequestEntityTooLarge)
		case form.Get("audience") == forbiddenAudience:
			f.refused.Add(1)
			http.Error(w, "<html>Forbidden", http.StatusForbidden)
		default:
			r.Body = io.NopCloser(bytes.NewReader(body))
			behind.ServeHTTP(w, r)
		}
	}), nil) + oauthserver.TokenPath
	return f
}
