// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// The most basic test: Vault returns a role's token, and a real API accepts it.
func TestTokenOpensTheAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/writer", role(map[string]any{"scopes": "write:data"}))
	verification := len(w.oauth.Requests())

	before := time.Now()
	secret := w.read("creds/app")
	if status := w.callAPI(secret.Data["access_token"].(string)); status != http.StatusOK {
		t.Errorf("the API returned %d for the token, want 200", status)
	}
	if secret.LeaseID != "" || secret.LeaseDuration != 0 {
		t.Errorf("got lease %q of %d s, want none", secret.LeaseID, secret.LeaseDuration)
	}
	if len(secret.Warnings) != 0 {
		t.Errorf("got the warnings %q", secret.Warnings)
	}
	if len(secret.Data) != 8 {
		t.Errorf("got the keys of %v, want 8", secret.Data)
	}
	if got := secret.Data["token_type"]; got != "Bearer" {
		t.Errorf("got token_type %v", got)
	}
	if got := secret.Data["scope"]; got != oauthserver.DataScope {
		t.Errorf("got scope %v", got)
	}
	expires, err := time.Parse(time.RFC3339, secret.Data["expires_at"].(string))
	if err != nil {
		t.Fatal(err)
	}
	if got := number(w, secret.Data["expires_at_seconds"]); got != expires.Unix() {
		t.Errorf("expires_at_seconds %d is not expires_at %s", got, expires)
	}
	if life := expires.Sub(before); life < 59*time.Minute || life > 61*time.Minute {
		t.Errorf("expires in %s, want an hour", life)
	}
	if minted, err := time.Parse(time.RFC3339, secret.Data["last_vault_rotation"].(string)); err != nil || minted.Sub(before) < -2*time.Second || minted.Sub(before) > 10*time.Second {
		t.Errorf("got last_vault_rotation %v, %v", minted, err)
	}
	// An hour: R is 15 min and the jitter up to 5 min.
	if got := number(w, secret.Data["ttl"]); got < 2690 || got > 3000 {
		t.Errorf("got ttl %d", got)
	}
	if got := number(w, secret.Data["rotation_period"]); got < 2690 || got > 2700 {
		t.Errorf("got rotation_period %d", got)
	}

	if again := w.token("app"); again != secret.Data["access_token"] {
		t.Error("a second read returned another token")
	}
	if got := len(w.oauth.Requests()) - verification; got != 1 {
		t.Errorf("two reads caused %d token requests, want 1", got)
	}
	if status := w.callAPI(w.token("writer")); status != http.StatusForbidden {
		t.Errorf("the API returned %d for a token without its scope, want 403", status)
	}
}

func TestWireRequests(t *testing.T) {
	t.Parallel()
	const (
		id     = `id:with/res+rved &=%?#@ü`
		secret = `s:e/c+r e&t=%41?#@ü~"\`
	)
	w := newWorld(t)
	if err := w.oauth.SetClient(demoClient(id, secret)); err != nil {
		t.Fatal(err)
	}
	w.write("roles/app", role(map[string]any{
		"scopes":       oauthserver.DataScope + " write:data",
		"extra_params": map[string]any{"resource": "urn:x y&z"},
	}))
	for _, method := range []string{"client_secret_post", "client_secret_basic"} {
		w.write("config", w.config(map[string]any{
			"token_url":                  w.oauth.TokenURL() + "?env=test",
			"client_id":                  id,
			"client_secret":              secret,
			"token_endpoint_auth_method": method,
			"max_retries":                0,
		}))
		if method == "client_secret_basic" {
			// A change of the method keeps the tokens, so request a new one.
			w.write("roles/app", map[string]any{"extra_params": map[string]any{"resource": "other"}})
		}
		if status := w.callAPI(w.token("app")); status != http.StatusOK {
			t.Errorf("%s: the API returned %d", method, status)
		}
		requests := w.oauth.Requests()
		got := requests[len(requests)-1]
		if got.Method != http.MethodPost || got.Query != "env=test" {
			t.Errorf("%s: got %s with query %q", method, got.Method, got.Query)
		}
		if ct := got.Header.Get("Content-Type"); ct != "application/x-www-form-urlencoded" {
			t.Errorf("%s: got content type %q", method, ct)
		}
		if ua := got.Header.Get("User-Agent"); !strings.HasPrefix(ua, "Vault/") || !strings.Contains(ua, pluginName) {
			t.Errorf("%s: got user agent %q", method, ua)
		}
		form, err := url.ParseQuery(got.Body)
		if err != nil {
			t.Fatal(err)
		}
		want := url.Values{
			"grant_type": {"client_credentials"},
			"audience":   {oauthserver.DataAudience},
			"scope":      {oauthserver.DataScope + " write:data"},
			"resource":   {"urn:x y&z"},
		}
		authorization := ""
		if method == "client_secret_post" {
			want.Set("client_id", id)
			want.Set("client_secret", secret)
		} else {
			want.Set("resource", "other")
			authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(id)+":"+url.QueryEscape(secret)))
		}
		if form.Encode() != want.Encode() {
			t.Errorf("%s: got the form %q, want %q", method, form.Encode(), want.Encode())
		}
		if a := got.Header.Get("Authorization"); a != authorization {
			t.Errorf("%s: got Authorization %q, want %q", method, a, authorization)
		}
	}
}

// What a user sees of each mistake and fault: Vault's status, and an error that names the
// cause and the remedy.
func TestErrorsThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	logical := w.vault.Logical()

	_, err := logical.Read("mojoauth/creds/nobody")
	w.wantError(err, 400, `role "nobody" does not exist`, "roles/nobody")
	w.write("roles/app", role(nil))
	_, err = logical.Read("mojoauth/creds/app")
	w.wantError(err, 400, `config "default"`, `role "app"`, "write config/default")

	_, err = logical.Write("mojoauth/config", w.config(map[string]any{"client_secret": "wrong"}))
	w.wantError(err, 400, `config "default" was not saved`, "invalid_client", "HTTP 401", "client_secret", "verify_connection=false")
	if secret, err := logical.Read("mojoauth/config"); err != nil || secret != nil {
		t.Errorf("after a refused first write: got %v, %v; want no config", secret, err)
	}
	_, err = logical.Write("mojoauth/config", w.config(map[string]any{"token_url": "http://mojoauth.test/oauth2/token"}))
	w.wantError(err, 400, "token_url", "https")
	_, err = logical.Write("mojoauth/config", w.config(map[string]any{"request_timeout": "never"}))
	w.wantError(err, 400, "request_timeout")

	// A secret sent twice is a list. A value of the wrong type may contain the secret.
	for field, values := range map[string][]any{
		"client_secret":   {[]string{canary, "x"}, map[string]any{"value": canary}},
		"client_id":       {[]string{canary}},
		"request_timeout": {canary},
		"max_retries":     {canary},
	} {
		for _, value := range values {
			_, err = logical.Write("mojoauth/config", w.config(map[string]any{field: value}))
			w.wantError(err, 400, field+" is not valid")
		}
	}
	_, err = logical.Write("mojoauth/roles/app", map[string]any{"extra_params": []string{canary}})
	w.wantError(err, 400, "extra_params is not valid")

	w.write("config", w.config(map[string]any{"max_retries": 1, "request_timeout": "5s"}))
	working := w.token("app")

	// verify_connection keeps the old config, which continues to work.
	_, err = logical.Write("mojoauth/config", map[string]any{"client_secret": "wrong"})
	w.wantError(err, 400, "was not saved")
	if got := w.token("app"); got != working {
		t.Error("a refused write dropped the token")
	}
	w.write("roles/app2", role(nil))
	w.token("app2") // the old secret still mints

	// Writing one field keeps the others.
	w.write("config", map[string]any{"request_timeout": "6s"})
	config := w.read("config").Data
	if number(w, config["request_timeout"]) != 6 || number(w, config["max_retries"]) != 1 || config["client_id"] != clientID {
		t.Errorf("after an update of request_timeout: got %v", config)
	}
	if _, ok := config["client_secret"]; ok {
		t.Error("a read shows client_secret")
	}

	// The secret is not sent to another host unless the writer knows it.
	_, err = logical.Write("mojoauth/config", map[string]any{"token_url": "http://127.0.0.1:1/token", "verify_connection": false})
	w.wantError(err, 400, "token_url", "send client_secret in the same request")

	w.write("roles/badscope", role(map[string]any{"scopes": "delete:everything"}))
	_, err = logical.Read("mojoauth/creds/badscope")
	w.wantError(err, 400, `role "badscope"`, `config "default"`, "invalid_scope", "HTTP 400")
	w.write("roles/badaudience", role(map[string]any{"audience": "https://other.example.org/"}))
	_, err = logical.Read("mojoauth/creds/badaudience")
	w.wantError(err, 400, `role "badaudience"`, `config "default"`, "invalid_request", "HTTP 400")
	if got := w.token("app2"); got == "" {
		t.Error("one role's refusal kept another from getting a token")
	}

	// A wrong secret, saved without verification.
	w.write("config/wrong", w.config(map[string]any{"client_secret": "wrong", "verify_connection": false}))
	w.write("roles/wrong", role(map[string]any{"config": "wrong"}))
	_, err = logical.Read("mojoauth/creds/wrong")
	w.wantError(err, 400, `config "wrong"`, "invalid_client", "HTTP 401", "Check client_id, client_secret", "The next attempt is at")

	// A server that is not running.
	dead := "http://" + harness.FreeAddress(t) + "/oauth2/token"
	_, err = logical.Write("mojoauth/config/dead", w.config(map[string]any{"token_url": dead}))
	w.wantError(err, 400, `config "dead" was not saved`, "connection refused", "verify_connection=false")
	w.write("config/dead", w.config(map[string]any{"token_url": dead, "verify_connection": false, "max_retries": 0}))
	w.write("roles/dead", role(map[string]any{"config": "dead"}))
	_, err = logical.Read("mojoauth/creds/dead")
	w.wantError(err, 502, `config "dead"`, "connection refused", "The next attempt is at", "token_url")

	// A server that accepts the request and never answers.
	w.write("config/mute", w.config(map[string]any{"token_url": "http://" + mute(t), "verify_connection": false, "request_timeout": "1s"}))
	w.write("roles/mute", role(map[string]any{"config": "mute"}))
	_, err = logical.Read("mojoauth/creds/mute")
	w.wantError(err, 504, `config "mute"`, "within the request_timeout of 1s", "The next attempt is at")

	// Deleting a role or config drops its tokens.
	w.write("roles/app3", role(nil))
	w.token("app3")
	if _, err := logical.Delete("mojoauth/roles/app3"); err != nil {
		t.Fatal(err)
	}
	_, err = logical.Read("mojoauth/creds/app3")
	w.wantError(err, 400, `role "app3" does not exist`)
	if _, err := logical.Delete("mojoauth/config"); err != nil {
		t.Fatal(err)
	}
	_, err = logical.Read("mojoauth/creds/app")
	w.wantError(err, 400, `config "default"`, "does not exist")

	w.noCanary()
}

// noCanary searches everything that Vault has returned, logged or audited for the client
// secret.
func (w *world) noCanary() {
	w.Helper()
	audit, err := os.ReadFile(w.vault.AuditFile)
	if err != nil {
		w.Fatal(err)
	}
	for place, text := range map[string]string{
		"a response": w.vault.Responses(),
		"the log":    w.vault.Log(w),
		"the audit":  string(audit),
	} {
		if len(text) == 0 {
			w.Errorf("%s is empty: nothing was searched", place)
		}
		if i := strings.Index(text, canary); i >= 0 {
			w.Errorf("the client secret is in %s: …%s…", place, text[max(0, i-200):i])
		}
	}
	// The plugin's own entries are in Vault's log, so they were searched too.
	if !strings.Contains(w.vault.Log(w), pluginBinary) {
		w.Error("the log has no line of the plugin")
	}
	for _, token := range w.oauth.Issued() {
		if strings.Contains(w.vault.Log(w), token) || strings.Contains(string(audit), token) {
			w.Error("an access token is in the log or the audit")
		}
	}
}

func TestStateSurvivesSealAndCrash(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"max_retries": 1}))
	w.write("config/second", w.config(nil))
	w.write("roles/app", role(map[string]any{"min_ttl": "5m"}))
	config, appRole := w.read("config").Data, w.read("roles/app").Data
	w.token("app")

	check := func(after string) {
		t.Helper()
		for path, want := range map[string]map[string]any{"config": config, "roles/app": appRole} {
			got := w.read(path).Data
			for field, value := range want {
				if gotJSON, wantJSON := toJSON(t, got[field]), toJSON(t, value); gotJSON != wantJSON {
					t.Errorf("after %s: got %s of %s %s, was %s", after, field, path, gotJSON, wantJSON)
				}
			}
		}
		if status := w.callAPI(w.token("app")); status != http.StatusOK {
			t.Errorf("after %s: the API returned %d", after, status)
		}
	}

	if err := w.vault.Sys().Seal(); err != nil {
		t.Fatal(err)
	}
	w.vault.Unseal(t)
	check("a seal")

	old := w.vault.PluginProcesses(t, pluginBinary)
	w.vault.SignalPlugin(t, pluginBinary, syscall.SIGKILL)
	harness.Eventually(t, "Vault starts the plugin again", func() error {
		_, err := w.vault.Logical().Read("mojoauth/config")
		return err
	})
	if now := w.vault.PluginProcesses(t, pluginBinary); len(now) == 0 || now[0] == old[0] {
		t.Errorf("processes before the kill: %v, after: %v; want another one", old, now)
	}
	check("a crash of the plugin")
	w.noCanary()
}

// Mounts of the plugin run in one process, and share nothing else.
func TestMountsShareAProcessAndNothingElse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.vault.Enable(t, "second", pluginName, pluginVersion)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.token("app")
	_, err := w.vault.Logical().Read("second/creds/app")
	w.wantError(err, 400, `role "app" does not exist`)
	if got := w.vault.PluginProcesses(t, pluginBinary); len(got) != 1 {
		t.Errorf("got %d processes for two mounts, want 1", len(got))
	}
	if err := w.vault.Sys().Unmount("second"); err != nil {
		t.Fatal(err)
	}
	w.token("app")
}

// A plugin whose Vault was killed gets no signal to exit. It logs nothing either, which
// would end it: the pipe is broken.
func TestPluginEndsWithVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.read("status")
	plugins := w.vault.PluginProcesses(t, pluginBinary)
	if len(plugins) == 0 {
		t.Fatal("the plugin is not running")
	}
	w.vault.Kill(t)
	for _, pid := range plugins {
		harness.Eventually(t, "the plugin has exited", func() error {
			if err := syscall.Kill(pid, 0); err == nil {
				return fmt.Errorf("process %d is still running", pid)
			}
			return nil
		})
	}
}
