// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Every way in which the token endpoint may misbehave, as Vault's own client sees it.
// gRPC flattens errors, so in-process tests do not show that. The answers repeat the
// client secret wherever they can.
func TestEveryFaultThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other := startOAuth(t) // where a redirect points
	field := func(value string) map[string]rawJSON { return map[string]rawJSON{"expires_in": rawJSON(value)} }
	oauthError := func(status int, code string) oauthserver.Faults {
		return oauthserver.Faults{Status: status, Body: fmt.Sprintf(`{"error":%q,"error_description":"you sent %s"}`, code, canary)}
	}
	cases := []struct {
		name   string
		fault  oauthserver.Faults
		status int // 200: the read succeeds
		text   string
		tries  int // at most 2; 0 if it depends on the pace
	}{
		{"no-fault", oauthserver.Faults{}, 200, "", 1},
		{"latency", oauthserver.Faults{Latency: oauthserver.Duration(300 * time.Millisecond)}, 200, "", 1},
		{"expires-in-string", oauthserver.Faults{Fields: field(`"3600"`)}, 200, "", 1},
		{"expires-in-float", oauthserver.Faults{Fields: field(`3600.5`)}, 200, "", 1},
		{"expires-in-time", oauthserver.Faults{Fields: field(`"2099-01-01T00:00:00Z"`)}, 200, "", 1},
		{"expires-in-absent", oauthserver.Faults{Fields: field(`null`)}, 200, "", 1},
		{"expires-in-negative", oauthserver.Faults{Fields: field(`-1`)}, 200, "", 1},
		{"no-type-no-scope", oauthserver.Faults{Fields: map[string]rawJSON{"token_type": rawJSON("null"), "scope": rawJSON("null")}}, 200, "", 1},
		{"content-type", oauthserver.Faults{Header: map[string]string{"Content-Type": "text/plain"}}, 200, "", 1},
		{"one-503", oauthserver.Faults{Status: 503, Requests: 1}, 200, "", 2},
		{"one-dropped", oauthserver.Faults{Drop: "before", Requests: 1}, 200, "", 2},
		{"gzip", oauthserver.Faults{Gzip: true}, 200, "", 1},

		{"invalid-client", oauthError(401, "invalid_client"), 400, "invalid_client: [description withheld] (HTTP 401)", 1},
		{"unauthorized-client", oauthError(400, "unauthorized_client"), 400, "unauthorized_client", 1},
		{"invalid-scope", oauthError(400, "invalid_scope"), 400, "invalid_scope", 1},
		{"invalid-target", oauthError(400, "invalid_target"), 400, "invalid_target", 1},
		{"denied", oauthError(403, "access_denied"), 400, "access_denied: [description withheld] (HTTP 403)", 1},
		{"error-under-200", oauthError(200, "invalid_scope"), 400, "invalid_scope", 1},
		{"mojoauth-error", oauthserver.Faults{Status: 401, Body: `{"error_code":900,"message":"no","description":"` + canary + `"}`}, 400, "[description withheld] (HTTP 401)", 1},
		{"not-found", oauthserver.Faults{Status: 404, Body: canary}, 400, "(HTTP 404). The next attempt is at", 1},
		{"forbidden", oauthserver.Faults{Status: 403}, 400, "(HTTP 403)", 1},
		{"one-429", oauthserver.Faults{Status: 429, Requests: 1}, 200, "", 2},
		{"throttled", oauthserver.Faults{Status: 429}, 429, "HTTP 429", 0},
		{"throttled-for-long", oauthserver.Faults{Status: 429, Header: map[string]string{"Retry-After": "300"}}, 429, "Try again in 5m", 1},
		{"throttled-until", oauthserver.Faults{Status: 429, Header: map[string]string{"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}}, 429, "Try again in 10m", 1},
		{"500", oauthserver.Faults{Status: 500, Body: canary}, 502, "(HTTP 500)", 2},
		{"501", oauthserver.Faults{Status: 501}, 502, "(HTTP 501)", 1},
		{"502", oauthserver.Faults{Status: 502}, 502, "(HTTP 502)", 2},
		{"503", oauthserver.Faults{Status: 503, BodySize: 1 << 20}, 502, "(HTTP 503)", 2},
		{"504", oauthserver.Faults{Status: 504}, 502, "(HTTP 504)", 2},
		{"redirect", oauthserver.Faults{Status: 307, Header: map[string]string{"Location": other.TokenURL()}}, 502, "redirects", 1},
		{"garbage", oauthserver.Faults{Status: 200, Body: "<html>" + canary}, 502, "not a JSON object", 1},
		{"no-token", oauthserver.Faults{Fields: map[string]rawJSON{"access_token": rawJSON("null")}}, 502, "no access_token", 1},
		{"10mb", oauthserver.Faults{Status: 200, BodySize: 10 << 20}, 502, "longer than 64 KiB", 1},
		{"gzip-bomb", oauthserver.Faults{Status: 200, BodySize: 100 << 20, Gzip: true}, 502, "longer than 64 KiB", 1},
		{"dropped", oauthserver.Faults{Drop: "before"}, 502, "the connection broke", 2},
		{"dropped-in-the-body", oauthserver.Faults{Drop: "body"}, 502, "the connection broke", 2},
		{"hang", oauthserver.Faults{Hang: true}, 504, "within the request_timeout of 2s. The next attempt is at", 1},
		{"late-503", oauthserver.Faults{Status: 503, Latency: oauthserver.Duration(1500 * time.Millisecond)}, 502, "(HTTP 503)", 2},
	}
	for _, c := range cases {
		w.oauth.SetFaults(oauthserver.Faults{})
		w.write("config/"+c.name, w.config(map[string]any{"verify_connection": false, "max_retries": 1, "request_timeout": "2s"}))
		w.write("roles/"+c.name, role(map[string]any{"config": c.name}))
		w.oauth.SetFaults(c.fault)
		before := len(w.oauth.Requests())
		secret, err := w.vault.Logical().Read("mojoauth/creds/" + c.name)
		if c.status == 200 {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			} else if secret.Data["token_type"] != "Bearer" || secret.Data["scope"] != oauthserver.DataScope {
				t.Errorf("%s: got %v", c.name, secret.Data)
			}
		} else {
			w.wantError(err, c.status, fmt.Sprintf("role %q: config %q: ", c.name, c.name), c.text)
		}
		if got := len(w.oauth.Requests()) - before; c.tries > 0 && got != c.tries {
			t.Errorf("%s: %d requests, want %d", c.name, got, c.tries)
		}
	}
	if got := len(other.Requests()); got != 0 {
		t.Errorf("the target of a redirect got %d requests", got)
	}

	// Saving with verification refuses every fault, with its own error text.
	for _, c := range cases {
		if c.status == 200 || c.name == "gzip-bomb" || c.name == "hang" {
			continue
		}
		w.oauth.SetFaults(c.fault)
		_, err := w.vault.Logical().Write("mojoauth/config/verified-"+c.name, w.config(map[string]any{"max_retries": 0, "request_timeout": "2s"}))
		if slices.Contains([]string{"invalid-scope", "invalid-target", "denied", "error-under-200"}, c.name) {
			if err != nil { // the client was accepted
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		w.wantError(err, 400, fmt.Sprintf("config %q was not saved", "verified-"+c.name), "verify_connection=false")
	}
	status, metrics := toJSON(t, w.read("status").Data), w.scrape()
	for _, token := range w.oauth.Issued() {
		if strings.Contains(status, token) || strings.Contains(metrics, token) {
			t.Error("an access token is in status or metrics")
		}
	}
	// The stack dump that a crash during a mint leaves in Vault's log.
	w.write("roles/crash", role(map[string]any{"config": "no-fault"}))
	w.oauth.SetFaults(oauthserver.Faults{Hang: true})
	before := len(w.oauth.Requests())
	go func() { _, _ = w.vault.Logical().Read("mojoauth/creds/crash") }()
	harness.Eventually(t, "the mint is in progress", func() error {
		if len(w.oauth.Requests()) == before {
			return errors.New("not yet")
		}
		return nil
	})
	w.vault.SignalPlugin(t, pluginBinary, syscall.SIGQUIT)
	harness.Eventually(t, "the crash is in the log", func() error {
		if !strings.Contains(w.vault.Log(t), "mojoauth.(*slot).fly") {
			return errors.New("no mint's goroutine yet")
		}
		return nil
	})
	w.noCanary()
}

type rawJSON = json.RawMessage

// scrape reads the metrics as Prometheus does.
func (w *world) scrape() string {
	w.Helper()
	resp, err := w.vault.Logical().ReadRaw("mojoauth/metrics")
	if err != nil {
		w.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.Fatal(err)
	}
	if got := resp.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		w.Errorf("got content type %q for the metrics", got)
	}
	return string(body)
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := harness.NewAuthority(t)
	serve := func(certificate tls.Certificate) *oauthserver.Server {
		t.Helper()
		server, err := oauthserver.New(time.Hour, demoClient(clientID, canary))
		if err != nil {
			t.Fatal(err)
		}
		if err := server.StartTLS("127.0.0.1:0", certificate); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		return server
	}
	soon := time.Now().Add(time.Hour)
	private := serve(ca.Issue(t, "127.0.0.1", soon))
	for _, c := range []struct {
		name   string
		server *oauthserver.Server
		trust  bool
		text   string // "" if there is a token
	}{
		{"private", private, true, ""},
		{"unknown", private, false, "does not trust; if it is your own authority, set ca_cert"},
		{"expired", serve(ca.Issue(t, "127.0.0.1", time.Now().Add(-time.Minute))), true, "expired"},
		{"other-host", serve(ca.Issue(t, "192.0.2.1", soon)), true, "a different host"},
	} {
		fields := map[string]any{"token_url": c.server.TokenURL(), "verify_connection": false, "max_retries": 2}
		if c.trust {
			fields["ca_cert"] = ca.PEM
		}
		w.write("config/"+c.name, w.config(fields))
		w.write("roles/"+c.name, role(map[string]any{"config": c.name}))
		_, err := w.vault.Logical().Read("mojoauth/creds/" + c.name)
		if c.text == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		w.wantError(err, 502, c.text, "ca_cert")
		if c.server != private && len(c.server.Requests()) != 0 {
			t.Errorf("%s: the secret was sent", c.name)
		}
	}
	if got := len(private.Requests()); got != 1 {
		t.Errorf("the private server got %d requests, want only the trusted one", got)
	}
}

// 100 readers share a token that is valid for 40 s (F = 4 s, R = 10 s). Halfway through
// its lifetime, MojoAuth goes down for 25 s, until after the token has expired.
func TestOutageDrill(t *testing.T) {
	t.Parallel()
	const (
		lifetime = 40 * time.Second
		floor    = 4 * time.Second
		outage   = 25 * time.Second
		readers  = 100
	)
	vault := harness.StartVault(t, vaultBinary, pluginDir)
	vault.Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	for name, fault := range map[string]oauthserver.Faults{
		"refused": {},
		"hang":    {Hang: true},
		"503":     {Status: 503},
		"429":     {Status: 429, Header: map[string]string{"Retry-After": "30"}}, // longer than a read waits
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &world{TB: t, vault: vault, oauth: startOAuth(t)}
			vault.Enable(t, "drill-"+name, pluginName, pluginVersion)
			read := func(path string) (*api.Secret, error) {
				return w.vault.Logical().Read("drill-" + name + "/" + path)
			}
			for path, data := range map[string]map[string]any{"config": w.config(nil), "roles/app": role(nil)} {
				if _, err := vault.Logical().Write("drill-"+name+"/"+path, data); err != nil {
					t.Fatal(err)
				}
			}
			w.oauth.SetLifetime(lifetime + time.Second) // the server rounds down
			first, err := read("creds/app")
			if err != nil {
				t.Fatal(err)
			}
			expires := time.Unix(number(w, first.Data["expires_at_seconds"]), 0)

			// 100 readers, each reading once a second.
			client := w.reader(readers)
			stop := make(chan struct{})
			var wg sync.WaitGroup
			var errorsEarly, errorsLate, badErrors, renewed atomic.Int64
			for i := range readers {
				wg.Go(func() {
					time.Sleep(time.Duration(i) * time.Second / readers)
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Second):
						}
						secret, err := client.Logical().Read("drill-" + name + "/creds/app")
						var answer *api.ResponseError
						switch {
						case err == nil:
							if secret.Data["access_token"] != first.Data["access_token"] {
								renewed.CompareAndSwap(0, time.Now().UnixNano())
							}
						case time.Now().Before(expires.Add(-floor)):
							errorsEarly.Add(1)
							t.Logf("got an error while the old token was above the floor: %v", err)
						case errors.As(err, &answer) && name != "429" && (answer.StatusCode == 502 || answer.StatusCode == 504) && strings.Contains(err.Error(), "The next attempt is "):
							errorsLate.Add(1)
						case errors.As(err, &answer) && name == "429" && answer.StatusCode == 429 && strings.Contains(err.Error(), "Try again in "):
							errorsLate.Add(1)
						default:
							badErrors.Add(1)
							t.Logf("got an incomplete error: %v", err)
						}
					}
				})
			}

			time.Sleep(time.Until(expires.Add(-lifetime / 2)))
			before := len(w.oauth.Requests())
			began := time.Now()
			address := strings.TrimPrefix(w.oauth.URL(), "http://")
			if name == "refused" {
				w.oauth.Close()
			} else {
				w.oauth.SetFaults(fault)
			}

			// After the token has expired, readers get the remembered error immediately.
			// The same is true for a Retry-After that is too long.
			time.Sleep(time.Until(expires.Add(-floor / 2)))
			var took []time.Duration
			for time.Since(began) < outage-2*time.Second {
				asked := time.Now()
				if _, err := read("creds/app"); err != nil {
					took = append(took, time.Since(asked))
				}
				time.Sleep(20 * time.Millisecond)
			}
			time.Sleep(time.Until(began.Add(outage)))
			requests := len(w.oauth.Requests()) - before

			status, err := read("status")
			if err != nil {
				t.Fatal(err)
			}
			config := status.Data["configs"].(map[string]any)["default"].(map[string]any)
			failures := status.Data["mint_failures"].(map[string]any)
			class := map[string]string{"refused": "network", "hang": "timeout", "503": "server_error"}[name]
			series := `mojoauth_mints_total{config="default",result="` + class + `"}`
			for _, key := range []string{"last_error", "last_error_class", "last_error_at", "last_mint_at"} {
				if outage := class != "" || key == "last_mint_at"; (config[key] != nil) != outage { // a 429 is not an outage
					t.Errorf("got %s in status: %v", key, config)
				}
			}
			if class == "" {
				series = `mojoauth_requests_total{config="default",result="throttled"}`
			} else if config["last_error_class"] != class || failures[class] == nil {
				t.Errorf("got %v and %v in status, want %s", config["last_error_class"], failures, class)
			}
			if name == "refused" { // no server to count requests: a first mint of three tries, then one each
				requests = 2 + int(number(w, failures[class]))
			}

			recovered := time.Now()
			if name == "refused" {
				if err := w.oauth.Start(address); err != nil {
					t.Fatal(err)
				}
			} else {
				w.oauth.SetFaults(oauthserver.Faults{})
			}
			harness.Eventually(t, "a new token", func() error {
				if renewed.Load() == 0 {
					return errors.New("none yet")
				}
				return nil
			})
			after := time.Unix(0, renewed.Load()).Sub(recovered)
			close(stop)
			wg.Wait()

			t.Logf("%s: %d requests in the outage, %d errors past the floor, returned within %s (median of %d), new token %s after recovery",
				name, requests, errorsLate.Load(), median(took), len(took), after.Round(10*time.Millisecond))
			if errorsEarly.Load() != 0 || badErrors.Load() != 0 {
				t.Errorf("got %d errors while the old token was above the floor, and %d that do not say when the next try is", errorsEarly.Load(), badErrors.Load())
			}
			if errorsLate.Load() == 0 {
				t.Error("no error after the token had expired: the test did not get that far")
			}
			if requests > 6 {
				t.Errorf("got %d requests in the outage, want at most 6", requests)
			}
			// A reader that waits for a mint waits 2 s.
			if got := median(took); got > time.Second {
				t.Errorf("a remembered error took %s (median), want it immediately", got)
			}
			if after > 31*time.Second {
				t.Errorf("the new token came %s after the recovery, want at most a back-off of 30 s", after)
			}
			if resp, err := vault.Logical().ReadRaw("drill-" + name + "/metrics"); err != nil {
				t.Error(err)
			} else {
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				for _, line := range []string{`mojoauth_config_in_backoff{config="default"} 0`, series, `mojoauth_reads_total{outcome="stale"}`} {
					if !strings.Contains(string(body), line) {
						t.Errorf("the metrics do not have %s", line)
					}
				}
			}
		})
	}
}

// A Retry-After closes the gate to every request: first requests, those of scope subsets,
// and rotations.
func TestRetryAfterOnAColdRole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"request_timeout": "2s"}))
	w.write("roles/app", role(map[string]any{"scopes": "read:data,write:data"}))
	w.write("roles/other", role(map[string]any{"scopes": "read:data,write:data"}))
	w.oauth.SetFaults(oauthserver.Faults{Status: 429, Header: map[string]string{"Retry-After": "20"}})
	before := len(w.oauth.Requests())
	_, err := w.vault.Logical().Read("mojoauth/creds/app")
	w.wantError(err, 429, "HTTP 429", "Try again in ")
	first := w.oauth.Requests()[before].At
	for time.Since(first) < 15*time.Second { // a read waits at most 3 s
		asked := time.Now()
		for _, path := range []string{"creds/app", "creds/other"} {
			for _, query := range []map[string][]string{nil, {"min_ttl": {"5m"}}, {"scopes": {oauthserver.DataScope}}} {
				if _, err := w.vault.Logical().ReadWithData("mojoauth/"+path, query); err == nil {
					t.Fatalf("%s %v: got a token from a server that throttles", path, query)
				}
			}
		}
		_, err := w.vault.Logical().Write("mojoauth/rotate-role/app", nil)
		w.wantError(err, 429, "HTTP 429")
		if took := time.Since(asked); took > 2*time.Second {
			t.Errorf("seven requests took %s, want immediate responses", took)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if got := len(w.oauth.Requests()) - before; got != 1 {
		t.Errorf("got %d requests within 15 s, want 1", got)
	}
	w.oauth.SetFaults(oauthserver.Faults{})
	harness.Eventually(t, "a token after the wait", func() error {
		_, err := w.vault.Logical().Read("mojoauth/creds/app")
		return err
	})
	if at := w.oauth.Requests()[before+1].At; at.Sub(first) < 20*time.Second {
		t.Errorf("the second request was %s after the first", at.Sub(first))
	}
}

// Users of `make dev` can simulate an outage by hand.
func TestFaultsOverHTTP(t *testing.T) {
	t.Parallel()
	server := startOAuth(t)
	do := func(method, body string) int {
		t.Helper()
		req, err := http.NewRequest(method, server.URL()+oauthserver.FaultsPath, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	token := func() int {
		t.Helper()
		resp, err := http.PostForm(server.TokenURL(), map[string][]string{
			"grant_type": {"client_credentials"}, "client_id": {clientID}, "client_secret": {canary},
		})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if do(http.MethodPut, `{"status": 503, "requests": 2}`) != 200 || token() != 503 || token() != 503 || token() != 200 {
		t.Error("want exactly two failed requests")
	}
	if do(http.MethodPut, `{"status": 429}`) != 200 || token() != 429 || do(http.MethodDelete, "") != 200 || token() != 200 {
		t.Error("requests did not fail exactly until the fault was deleted")
	}
	if do(http.MethodPut, `{"rate_limit": 1, "retry_after": 1}`) != 200 || token() != 200 || token() != 429 || do(http.MethodDelete, "") != 200 || token() != 200 {
		t.Error("want exactly one failure of two requests in a second")
	}
	if do(http.MethodPut, `{"stat": 429}`) != 400 || do(http.MethodPut, `{"drop": "always"}`) != 400 || do(http.MethodPut, `{"rate_limit": -1}`) != 400 {
		t.Error("invalid faults were accepted")
	}
}
