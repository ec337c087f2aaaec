// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
)

// FuzzTokenURL searches for a URL that the engine accepts and that would send the client
// secret somewhere it must not go.
func FuzzTokenURL(f *testing.F) {
	for _, seed := range []string{
		"https://your-app.mojoauth.com/oauth2/token?env=test",
		"https://my_project-1a2b.auth.mojoauth.com/oauth2/token",
		"http://localhost:8080/", "http://[::1]:80", "http://127.0.0.1@evil.test/", "http://localhost%00.evil.test/",
		"https://a:b@c/", "https://c/#", "https:/c", "https:c", "//c", "HTTPS://C:443/", "https://c:0/", "https://c:99999/",
		"https://[::ffff:127.0.0.1]/", "http://[::ffff:127.0.0.1%25eth0]/", "https://\u212b/", "https://c\\@d/",
		"https://log\u0130n.test/", "https://log%C4%B0n.test/", "http://localho\u017ft/", "https://c\u3002d/", "https://xn--c/", "https://]", "https://[c]/", "https://c.:/",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if validateTokenURL(raw) != nil {
			return
		}
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatalf("%q: accepted, but cannot be parsed: %v", raw, err)
		}
		if u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
			t.Errorf("%q: the secret would be sent unencrypted to %s", raw, u.Host)
		}
		if u.User != nil || u.Fragment != "" || u.Hostname() == "" {
			t.Errorf("%q: accepted", raw)
		}
		// The engine connects to the host that an operator reads in the URL, apart from
		// case.
		_, after, _ := strings.Cut(raw, "://")
		authority := after
		if end := strings.IndexAny(after, "/?#"); end >= 0 {
			authority = after[:end]
		}
		dialed := dialedBy(t, raw, "")
		host, port, err := net.SplitHostPort(dialed.address)
		if err != nil {
			t.Fatalf("%q connects to %q: %v", raw, dialed.address, err)
		}
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		switch given := strings.TrimSuffix(authority, ":"); given {
		case host, host + ":" + port:
		default:
			t.Errorf("%q: the connection goes to %s", raw, dialed.address)
		}
		if dialed.encrypted != (u.Scheme == "https") {
			t.Errorf("%q: got encrypted %v", raw, dialed.encrypted)
		}
	})
}

// FuzzRedirectWithoutSecret searches for a write without the client secret that sends the
// stored secret to another address, or makes the engine trust another server.
func FuzzRedirectWithoutSecret(f *testing.F) {
	certificates := testCertificates(f, 2)
	pick := func(n uint8) string { return append(certificates, "", "\n"+certificates[0])[n%4] }
	for _, seed := range [][2]string{
		{"https://login.api.example/", "https://log\u0130n.api.example/"},
		{"https://login.api.example/", "https://log%C4%B0n.api.example/"},
		{"https://login.api.example/", "https://LOGIN.api.example/"},
		{"https://login.api.example/", "https://login.api.example:443/"},
		{"https://login.api.example/", "https://login.api.example./"},
		{"https://login.api.example/a", "https://login.api.example/b?env=test"},
		{"https://k.example/", "https://\u212a.example/"},
		{"http://localhost/", "http://localho\u017ft/"},
		{"http://127.0.0.1/", "http://[::ffff:127.0.0.1]/"},
		{"https://c.example/", "https://c\uff0eexample/"},
	} {
		f.Add(seed[0], seed[1], uint8(0), uint8(0), true, false)
		f.Add(seed[0], seed[1], uint8(2), uint8(1), true, true)
	}
	for was := range uint8(4) {
		for becomes := range uint8(4) {
			f.Add("https://login.api.example/", "", was, becomes, false, true)
		}
	}
	f.Fuzz(func(t *testing.T, was, becomes string, caWas, caBecomes uint8, sendURL, sendCA bool) {
		schema := configFields()
		old, err := mergeConfig(nil, &framework.FieldData{Schema: schema, Raw: map[string]any{
			"token_url": was, "ca_cert": pick(caWas), "client_id": "client", "client_secret": canary,
		}})
		if err != nil {
			return
		}
		change := map[string]any{}
		if sendURL {
			change["token_url"] = becomes
		}
		if sendCA {
			change["ca_cert"] = pick(caBecomes)
		}
		changed, err := mergeConfig(&held[configEntry]{entry: *old}, &framework.FieldData{Schema: schema, Raw: change})
		if err != nil {
			return
		}
		if changed.ClientSecret != canary {
			t.Errorf("the secret became %q", changed.ClientSecret)
		}
		before, after := dialedBy(t, old.TokenURL, old.CACert), dialedBy(t, changed.TokenURL, changed.CACert)
		if before.address != after.address || before.encrypted != after.encrypted {
			t.Errorf("from %q to %q without the secret: it went to %v and now goes to %v", was, becomes, before, after)
		}
		if !before.trusts.Equal(after.trusts) {
			t.Errorf("ca_cert from %q to %q without the secret: the engine trusts other servers", old.CACert, changed.CACert)
		}
	})
}

// dialed is where a request goes, and which servers are trusted there.
type dialed struct {
	address   string // as passed to the dialer
	encrypted bool
	trusts    *x509.CertPool
}

// dialedBy returns where Go's own client would send a request for the URL, without
// sending it.
func dialedBy(t *testing.T, rawURL, caCert string) dialed {
	t.Helper()
	d := dialed{trusts: x509.NewCertPool()}
	d.trusts.AppendCertsFromPEM([]byte(caCert))
	seen := errors.New("seen")
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: d.trusts},
		DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
			d.address = address
			return nil, seen
		},
		DialTLSContext: func(_ context.Context, _, address string) (net.Conn, error) {
			d.address, d.encrypted = address, true
			return nil, seen
		},
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, rawURL, nil)
	if err != nil {
		t.Fatalf("%q: accepted, but cannot be requested: %v", rawURL, err)
	}
	resp, err := transport.RoundTrip(req)
	if err == nil {
		_ = resp.Body.Close()
	}
	if !errors.Is(err, seen) {
		t.Fatalf("%q: accepted, but there is nothing to connect to: %v", rawURL, err)
	}
	return d
}
