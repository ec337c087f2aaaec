// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

func TestConfigRoundTrip(t *testing.T) {
	m := newTestMount(t)
	if got := m.read("config"); got != nil {
		t.Fatalf("before any write: got %v, want nothing", got)
	}
	m.write("config", testConfig(nil))
	want := map[string]any{
		"token_url":                  "https://project.auth.mojoauth.test/oauth2/token",
		"client_id":                  "client",
		"token_endpoint_auth_method": "client_secret_post",
		"ca_cert":                    "",
		"request_timeout":            int64(10),
		"max_retries":                2,
		"max_requests_per_second":    20,
		"persist_tokens":             true,
	}
	if got := m.read("config"); !maps.Equal(got, want) {
		t.Errorf("read: got %v, want %v", got, want)
	}
	if got := m.read("config/default"); !maps.Equal(got, want) {
		t.Errorf("bare config is not config/default: got %v", got)
	}
	m.write("config/other", testConfig(nil))
	if got, want := m.do(logical.ListOperation, "config/", nil).Data["keys"], []string{"default", "other"}; !slices.Equal(got.([]string), want) {
		t.Errorf("list: got %v, want %v", got, want)
	}
	m.do(logical.DeleteOperation, "config", nil)
	if got := m.read("config"); got != nil {
		t.Errorf("after delete: got %v, want nothing", got)
	}
	m.do(logical.DeleteOperation, "config", nil) // again: no error
}

func TestConfigUpdateKeepsOtherFields(t *testing.T) {
	m := newTestMount(t)
	m.write("config", testConfig(map[string]any{
		"token_endpoint_auth_method": "client_secret_basic",
		"request_timeout":            "5s",
		"max_retries":                0,
	}))
	m.write("config", map[string]any{"client_id": "other", "verify_connection": false})
	got := m.read("config")
	for field, want := range map[string]any{
		"client_id":                  "other",
		"token_url":                  "https://project.auth.mojoauth.test/oauth2/token",
		"token_endpoint_auth_method": "client_secret_basic",
		"request_timeout":            int64(5),
		"max_retries":                0,
	} {
		if got[field] != want {
			t.Errorf("%s: got %v, want %v", field, got[field], want)
		}
	}
	stored, err := m.configs.load(t.Context(), m.storage, "default")
	if err != nil {
		t.Fatal(err)
	}
	if stored.entry.ClientSecret != canary {
		t.Error("the client secret was not kept")
	}
}

func TestConfigRefusesInvalidFields(t *testing.T) {
	cases := []struct {
		name  string
		field string
		value any
		want  string // part of the error
	}{
		{"no URL", "token_url", "", "token_url is required"},
		{"relative", "token_url", "/oauth2/token", "token_url is not a full URL"},
		{"no host", "token_url", "https:///oauth2/token", "token_url is not a full URL"},
		{"opaque", "token_url", "https:mojoauth.test", "token_url is not a full URL"},
		{"space", "token_url", "https://mojoauth.test/to ken", "token_url is not a full URL"},
		{"line end", "token_url", "https://mojoauth.test/token\n", "token_url is not a full URL"},
		{"bracket for a host", "token_url", "https://]/", "token_url has a host that is neither"},
		{"brackets around a name", "token_url", "https://[mojoauth.test]/", "token_url is not a full URL"},
		{"quote in the host", "token_url", `https://mojo"auth.test/`, "token_url has a host that is neither"},
		{"comma in the host", "token_url", "https://a.test,b.test/", "token_url has a host that is neither"},
		{"http", "token_url", "http://mojoauth.test/token", "send an https URL"},
		{"http that looks like loopback", "token_url", "http://localhost.mojoauth.test/", "send an https URL"},
		{"scheme", "token_url", "ftp://mojoauth.test/token", `scheme "ftp"`},
		{"user information", "token_url", "https://a:b@mojoauth.test/token", "user information"},
		{"fragment", "token_url", "https://mojoauth.test/token#x", "fragment"},
		{"empty fragment", "token_url", "https://mojoauth.test/token#", "fragment"},
		{"port 0", "token_url", "https://mojoauth.test:0/", `port "0"`},
		{"port too high", "token_url", "https://mojoauth.test:65536/", `port "65536"`},
		{"no client_id", "client_id", "", "client_id is required"},
		{"client_id with line end", "client_id", "id\n", "client_id contains a control character"},
		{"no secret", "client_secret", "", "client_secret is required"},
		{"secret with two line ends", "client_secret", "secret\n\n", "client_secret contains a control character"},
		{"secret with a line end before", "client_secret", "\nsecret", "client_secret contains a control character"},
		{"secret with a carriage return", "client_secret", "secret\r", "client_secret contains a control character"},
		{"a line end for a secret", "client_secret", "\n", "client_secret is required"},
		{"auth method", "token_endpoint_auth_method", "none", `token_endpoint_auth_method "none"`},
		{"ca_cert no PEM", "ca_cert", "hello", "ca_cert is not PEM"},
		{"ca_cert a key", "ca_cert", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", `ca_cert contains a PEM block of type "PRIVATE KEY"`},
		{"ca_cert unreadable", "ca_cert", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ca_cert contains a certificate that cannot be parsed"},
		{"timeout 0", "request_timeout", 0, "request_timeout 0s is out of range"},
		{"timeout long", "request_timeout", "2m", "request_timeout 120s is out of range"},
		{"timeout negative", "request_timeout", "-1s", "request_timeout"},
		{"retries negative", "max_retries", -1, "max_retries -1 is out of range"},
		{"retries many", "max_retries", 11, "max_retries 11 is out of range"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newTestMount(t)
			text := m.refused(logical.UpdateOperation, "config/mine", testConfig(map[string]any{c.field: c.value}))
			if !strings.Contains(text, c.want) {
				t.Errorf("got %q, want it to contain %q", text, c.want)
			}
			if strings.Contains(text, canary) {
				t.Errorf("the error contains the client secret: %q", text)
			}
			if got := m.read("config/mine"); got != nil {
				t.Errorf("the config was saved: %v", got)
			}
		})
	}
}

// A newline from typing Enter or from the end of a file is not part of the secret.
func TestOneLineEndAfterTheSecretIsRemoved(t *testing.T) {
	for _, sent := range []string{canary, canary + "\n", canary + "\r\n"} {
		m := newTestMount(t)
		m.write("config", testConfig(map[string]any{"client_secret": sent}))
		stored, err := m.configs.load(t.Context(), m.storage, "default")
		if err != nil {
			t.Fatal(err)
		}
		if stored.entry.ClientSecret != canary {
			t.Errorf("sent %q: got %q", sent, stored.entry.ClientSecret)
		}
	}
}

func TestConfigAcceptsURLs(t *testing.T) {
	for _, u := range []string{
		"https://my_project-1a2b.auth.mojoauth.com/oauth2/token",
		"https://your-app.mojoauth.com/oauth2/token?env=test",
		"https://login.example.org",
		"https://[2001:db8::1]:8443/token",
		"http://localhost:8080/oauth2/token",
		"http://127.8.9.10/oauth2/token",
		"http://[::1]:8080/oauth2/token",
	} {
		m := newTestMount(t)
		m.write("config", testConfig(map[string]any{"token_url": u}))
		if got := m.read("config")["token_url"]; got != u {
			t.Errorf("got %v, want %v", got, u)
		}
	}
}

// Someone who does not know the client secret cannot redirect it to another host, or make
// the engine trust another server.
func TestSecretIsNotRedirectedUnlessItIsSent(t *testing.T) {
	const old = "https://project.auth.mojoauth.test/oauth2/token"
	certificates := testCertificates(t, 2)
	cases := []struct {
		name    string
		before  string // the ca_cert before the write
		change  map[string]any
		refused string // the field that requires the secret, "" for none
	}{
		{"host", "", map[string]any{"token_url": "https://evil.test/oauth2/token"}, "token_url"},
		{"host that looks the same", "", map[string]any{"token_url": "https://project.auth.mojoauth.test./oauth2/token"}, "token_url"},
		{"port", "", map[string]any{"token_url": "https://project.auth.mojoauth.test:8443/oauth2/token"}, "token_url"},
		{"default port", "", map[string]any{"token_url": "https://project.auth.mojoauth.test:443/oauth2/token"}, "token_url"},
		{"scheme", "", map[string]any{"token_url": "http://127.0.0.1/oauth2/token"}, "token_url"},
		{"case of the host", "", map[string]any{"token_url": "https://PROJECT.auth.mojoauth.test/oauth2/token"}, "token_url"},
		{"path", "", map[string]any{"token_url": "https://project.auth.mojoauth.test/v2/token"}, "token_url"},
		{"query", "", map[string]any{"token_url": old + "?env=test"}, "token_url"},
		{"trust where there was none", "", map[string]any{"ca_cert": certificates[0]}, "ca_cert"},
		{"other trust", certificates[0], map[string]any{"ca_cert": certificates[1]}, "ca_cert"},
		{"more trust", certificates[0], map[string]any{"ca_cert": certificates[0] + certificates[1]}, "ca_cert"},
		{"trust removed", certificates[0], map[string]any{"ca_cert": ""}, "ca_cert"},
		{"secret sent as null", "", map[string]any{"token_url": "https://evil.test/", "client_secret": nil}, "client_secret"},
		{"secret sent empty", "", map[string]any{"token_url": "https://evil.test/", "client_secret": ""}, "client_secret"},
		{"same URL", "", map[string]any{"token_url": old}, ""},
		{"same trust", certificates[0], map[string]any{"ca_cert": certificates[0]}, ""},
		{"same trust with white space around", certificates[0], map[string]any{"ca_cert": "\n" + certificates[0] + "\n\n"}, ""},
		{"no trust again", "", map[string]any{"ca_cert": ""}, ""},
		{"both again", certificates[0], map[string]any{"token_url": old, "ca_cert": certificates[0]}, ""},
		{"null for both", certificates[0], map[string]any{"token_url": nil, "ca_cert": nil}, ""},
		{"something else", certificates[0], map[string]any{"client_id": "other"}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newTestMount(t)
			m.write("config", testConfig(map[string]any{"token_url": old, "ca_cert": c.before}))
			before := m.read("config")
			c.change["verify_connection"] = false
			if c.refused == "" {
				m.write("config", c.change)
				return
			}
			text := m.refused(logical.UpdateOperation, "config", c.change)
			if !strings.Contains(text, c.refused+" ") || !strings.Contains(text, "client_secret") {
				t.Errorf("got %q, want %s and the remedy", text, c.refused)
			}
			if got := m.read("config"); !maps.Equal(got, before) {
				t.Errorf("the config was saved: got %v, was %v", got, before)
			}
			c.change["client_secret"] = canary
			m.write("config", c.change)
		})
	}
}

// A host with characters beyond ASCII has an ASCII form, and must not be mistaken for a
// host that looks like it: the lower case of U+0130 is i, but https://log\u0130n.test
// leads to xn--login-bgd.test.
func TestTokenURLHasAnASCIIHost(t *testing.T) {
	for _, u := range []string{
		"https://log\u0130n.mojoauth.test/oauth2/token",
		"https://log%C4%B0n.mojoauth.test/oauth2/token",
		"https://m\u00fcnchen.test/",
		"https://m%c3%bcnchen.test/",
		"https://\u212b/",
		"https://mojoauth\uff0etest/",
		"http://localho\u017ft/",
		"http://[::1%25\u00fc]/",
		"https://mojoauth.test\u3002evil.test:443/",
		"https://a%25b.test/",
		"https://[fe80::1%25eth0]/",
	} {
		m := newTestMount(t)
		text := m.refused(logical.UpdateOperation, "config", testConfig(map[string]any{"token_url": u}))
		if !strings.Contains(text, "token_url ") || !strings.Contains(text, "xn--") {
			t.Errorf("%+q: got %q, want it to name token_url and xn--", u, text)
		}
	}
	for _, u := range []string{
		"https://xn--mnchen-3ya.test/",
		"https://mojoauth.test/t\u00f6ken?q=\u00fc", // sent percent-encoded
		"https://mojoauth.test/a%25b?c=%C4%B0",
	} {
		m := newTestMount(t)
		m.write("config", testConfig(map[string]any{"token_url": u}))
	}
}

func TestConfigIsVerifiedBeforeItIsSaved(t *testing.T) {
	upstream := func(class errorClass, status int, code string) error {
		return &mintError{class: class, status: status, oauthError: code}
	}
	cases := []struct {
		name    string
		fail    error
		saved   bool
		warning bool
	}{
		{"works", nil, true, false},
		{"wrong secret", upstream(classClientRefused, 401, "invalid_client"), false, false},
		{"not found", upstream(classClientRefused, 404, ""), false, false},
		{"bad request without an OAuth error", upstream(classRequestRefused, 400, ""), false, false},
		{"server error", upstream(classServerError, 503, ""), false, false},
		{"nonsense", upstream(classUnexpected, 200, ""), false, false},
		{"TLS", upstream(classTLS, 0, ""), false, false},
		{"network", upstream(classNetwork, 0, ""), false, false},
		{"no answer in time", upstream(classTimeout, 0, ""), false, false},
		{"needs a scope", upstream(classRequestRefused, 400, "invalid_scope"), true, true},
		{"needs an audience", upstream(classRequestRefused, 400, "invalid_target"), true, true},
		{"needs something", upstream(classRequestRefused, 400, "invalid_request"), true, true},
		{"denied", upstream(classRequestRefused, 403, "access_denied"), true, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newTestMount(t)
			m.write("config", testConfig(nil))
			m.mojo.set(func(s *standIn) { s.fail = c.fail })
			change := map[string]any{"client_secret": "the-new-one"}
			if !c.saved {
				text := m.refused(logical.UpdateOperation, "config", change)
				if !strings.Contains(text, "verify_connection=false") || !strings.Contains(text, `"default"`) {
					t.Errorf("got %q, want the config's name and how to skip the verification", text)
				}
			} else if resp := m.write("config", change); (resp != nil && len(resp.Warnings) > 0) != c.warning {
				t.Errorf("got %v, want a warning: %v", resp, c.warning)
			}
			stored, err := m.configs.load(t.Context(), m.storage, "default")
			if err != nil {
				t.Fatal(err)
			}
			if got := stored.entry.ClientSecret == "the-new-one"; got != c.saved {
				t.Errorf("saved: %v, want %v", got, c.saved)
			}
			if got := m.mojo.mints.Load(); got != 1 {
				t.Errorf("got %d token requests, want 1", got)
			}
		})
	}
}

// Anyone who may write a config can make the engine send requests to any host. So a mount
// verifies one config at a time, at most once a second; a verification that gets no turn
// may fail.
func TestVerificationsRunOneAtATime(t *testing.T) {
	for name, latency := range map[string]time.Duration{"slow": 2 * time.Second, "quick": 0} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.mojo.set(func(s *standIn) { s.latency = latency })
				var saved atomic.Int64
				var wg sync.WaitGroup
				for i := range 8 {
					fields := testConfig(map[string]any{
						"token_url":         fmt.Sprintf("https://project.auth.mojoauth.test/oauth2/token?x=%d", i),
						"verify_connection": true,
					})
					wg.Go(func() {
						resp, err := m.request(logical.UpdateOperation, fmt.Sprintf("config/c%d", i%4), fields)
						switch {
						case err != nil:
							t.Errorf("got the error %v, want the config saved or an error response", err)
						case !resp.IsError():
							saved.Add(1)
						case !strings.Contains(resp.Error().Error(), "was not saved"):
							t.Errorf("got %q, want it to say that the config was not saved", resp.Error())
						}
					})
				}
				wg.Wait()
				m.mojo.set(func(s *standIn) {
					if s.peak != 1 {
						t.Errorf("got %d concurrent verifications, want 1", s.peak)
					}
				})
				sent := m.mojo.since(0)
				for i := 1; i < len(sent); i++ {
					if gap := sent[i].Sub(sent[i-1]); gap < time.Second {
						t.Errorf("verification %d came %s after the one before, want at least 1s", i+1, gap)
						break
					}
				}
				if saved.Load() == 0 {
					t.Error("no config was saved")
				}
				time.Sleep(time.Second)
				m.write("config/late", testConfig(map[string]any{"verify_connection": true}))
			})
		})
	}
}

// The endpoint accepts the request and never answers, and the client ignores its canceled
// context.
func TestVerificationIsAnsweredWithinOneDeadline(t *testing.T) {
	bubble(t, func(m *testMount) {
		deaf := make(chan struct{})
		defer close(deaf)
		m.mojo.set(func(s *standIn) { s.deaf = deaf })
		answer := make(chan string, 1)
		began := time.Now()
		go func() {
			resp, err := m.HandleRequest(context.Background(), &logical.Request{
				Operation: logical.CreateOperation, Path: "config", Storage: m.storage,
				Data: testConfig(map[string]any{"verify_connection": true, "request_timeout": "2s"}),
			})
			answer <- fmt.Sprint(resp.Error(), err)
		}()
		select {
		case text := <-answer:
			if took := time.Since(began); took > 3*time.Second || !strings.Contains(text, "verify_connection=false") {
				t.Errorf("after %s got %q, want an error within 3s that says the config was not saved and how to skip the verification", took, text)
			}
		case <-time.After(time.Hour):
			t.Error("a write got no response after an hour, want one within 3s")
		}
	})
}

// Vault runs the existence check before it decides which capability a write needs. A
// client that may only create must not overwrite what someone wrote in the meantime.
func TestCreateOverwritesNothing(t *testing.T) {
	for _, c := range []struct {
		path  string
		first map[string]any
		then  map[string]any
	}{
		{"config", testConfig(nil), testConfig(map[string]any{"client_id": "other"})},
		{"config/named", testConfig(nil), testConfig(map[string]any{"client_id": "other"})},
		{"roles/app", map[string]any{"audience": "first"}, map[string]any{"audience": "other"}},
	} {
		m := newTestMount(t)
		m.write(c.path, c.first)
		before := m.read(c.path)
		resp, err := m.request(logical.CreateOperation, c.path, c.then)
		if err != nil || !resp.IsError() {
			t.Errorf("creating %s, which exists: got %v, %v; want an error response", c.path, resp, err)
		}
		if after := m.read(c.path); !reflect.DeepEqual(after, before) {
			t.Errorf("creating %s, which exists, changed it to %v, was %v", c.path, after, before)
		}
	}
}

func TestConfigWriteThatCannotBeStored(t *testing.T) {
	m := newTestMount(t)
	m.write("config", testConfig(nil))
	broken := errors.New("disk full")
	m.storage.fail.Store(&broken)
	resp, err := m.HandleRequest(t.Context(), &logical.Request{
		Operation: logical.UpdateOperation, Path: "config", Storage: m.storage,
		Data: testConfig(map[string]any{"client_id": "other"}),
	})
	if !errors.Is(err, broken) {
		t.Fatalf("got %v, %v; want the storage's own error", resp, err)
	}
	m.storage.fail.Store(nil)
	if got := m.read("config")["client_id"]; got != "client" {
		t.Errorf("client_id: got %v, want the old one", got)
	}
}

func TestConfigIsSealWrapped(t *testing.T) {
	m := newTestMount(t)
	// Vault treats a pattern as a prefix only if it ends in a slash.
	for _, pattern := range m.SpecialPaths().SealWrapStorage {
		if strings.HasSuffix(pattern, "/") && strings.HasPrefix("config/default", pattern) {
			return
		}
	}
	t.Errorf("no pattern in %v covers config/default", m.SpecialPaths().SealWrapStorage)
}

func TestConfigWritesAreForwarded(t *testing.T) {
	m := newTestMount(t)
	for _, path := range []string{"config", "config/x", "roles/x"} {
		for _, op := range []logical.Operation{logical.CreateOperation, logical.UpdateOperation, logical.DeleteOperation} {
			props := m.Route(path).Operations[op].Properties()
			if !props.ForwardPerformanceStandby || !props.ForwardPerformanceSecondary {
				t.Errorf("%s %s is not forwarded", op, path)
			}
		}
	}
	if props := m.Route("creds/x").Operations[logical.ReadOperation].Properties(); props.ForwardPerformanceStandby || props.ForwardPerformanceSecondary {
		t.Error("reads of creds are forwarded; the node that receives them should serve them")
	}
}

// testCertificates returns n certificates in PEM.
func testCertificates(t testing.TB, n int) []string {
	t.Helper()
	var bundle []string
	for i := range n {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), IsCA: true, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(bundle, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}
	return bundle
}

// Configs stored before these fields existed have their default values.
func TestConfigStoredWithoutLaterFields(t *testing.T) {
	m := newTestMount(t)
	old := &logical.StorageEntry{Key: "config/old", Value: []byte(`{"token_url":"https://project.auth.mojoauth.test/oauth2/token","client_id":"client","client_secret":"x","token_endpoint_auth_method":"client_secret_post","request_timeout":10000000000,"max_retries":2,"token_generation":"G"}`)}
	if err := m.storage.Put(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	got := m.read("config/old")
	if got["max_requests_per_second"] != defaultMaxRequestsPerSecond || got["persist_tokens"] != true {
		t.Errorf("got %v, want the defaults of max_requests_per_second and persist_tokens", got)
	}
}
