// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// A reader whose token the API refused requests one that was minted later.

func mintedAfter(at string) map[string][]string { return map[string][]string{"minted_after": {at}} }

// after reads a token of the role minted after the given time.
func (w *world) after(client *api.Client, role, at string) *api.Secret {
	w.Helper()
	secret, err := client.Logical().ReadWithData("mojoauth/creds/"+role, mintedAfter(at))
	if err != nil {
		w.Errorf("creds/%s?minted_after=%s: %v", role, at, err)
		return &api.Secret{Data: map[string]any{}}
	}
	return secret
}

func rotatedAt(secret *api.Secret) string { return fmt.Sprint(secret.Data["last_vault_rotation"]) }

func TestMintedAfterMintsOnceForAll(t *testing.T) {
	t.Parallel()
	const readers = 50
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	refused := w.read("creds/app")
	time.Sleep(1100 * time.Millisecond) // a token minted in the same second would not count
	before := len(w.oauth.Requests())
	client := w.reader(readers)
	start := make(chan struct{})
	tokens := make(chan any, readers)
	var reading sync.WaitGroup
	for range readers {
		reading.Go(func() {
			<-start
			secret := w.after(client, "app", rotatedAt(refused))
			if len(secret.Warnings) != 0 {
				t.Errorf("got the warnings %q", secret.Warnings)
			}
			tokens <- secret.Data["access_token"]
		})
	}
	close(start)
	reading.Wait()
	close(tokens)
	fresh := w.read("creds/app").Data["access_token"]
	if fresh == refused.Data["access_token"] {
		t.Error("the refused token is still cached")
	}
	for token := range tokens {
		if token != fresh {
			t.Error("a reader got a token other than the cached one")
		}
	}
	if got := len(w.oauth.Requests()) - before; got != 1 {
		t.Errorf("%d concurrent readers caused %d requests, want 1", readers, got)
	}
}

func TestMintedAfterInALoop(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/other", role(nil))
	secret := w.read("creds/app")
	before := len(w.oauth.Requests())
	reads, warned := 0, 0
	for began := time.Now(); time.Since(began) < 5*time.Second; reads++ {
		refused := rotatedAt(secret)
		asked := time.Now()
		secret = w.after(w.vault.Client, "app", refused)
		if took := time.Since(asked); took > 4*time.Second {
			t.Errorf("a read took %s, want at most 2s", took)
		}
		if len(secret.Warnings) > 0 {
			warned++
			if text := strings.Join(secret.Warnings, " "); !strings.Contains(text, "No token minted after") {
				t.Errorf("got the warnings %q", secret.Warnings)
			}
		}
		if secret.Data["access_token"] == nil {
			t.FailNow()
		}
		time.Sleep(20 * time.Millisecond)
	}
	requests := len(w.oauth.Requests()) - before
	t.Logf("%d reads in a loop caused %d requests, and %d got the old token with a warning: %q", reads, requests, warned, secret.Warnings)
	if requests != 1 {
		t.Errorf("%d reads within 30 s caused %d requests, want 1", reads, requests)
	}
	if warned < reads/2 {
		t.Errorf("only %d of %d reads had a warning", warned, reads)
	}
	// Another role is not affected.
	other := w.read("creds/other")
	if got := w.after(w.vault.Client, "other", rotatedAt(other)); got.Data["access_token"] == other.Data["access_token"] {
		t.Error("another role got no new token")
	}
}

func TestMintedAfterReturnsNewerTokens(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/sooner", role(nil))
	w.write("roles/second", role(nil))
	w.write("roles/newer", role(nil))
	w.write("roles/narrow", role(map[string]any{"scopes": "read:data write:data"}))
	requests := func() int { return len(w.oauth.Requests()) }

	// One that expires sooner than the refused one.
	refused := w.read("creds/sooner")
	w.oauth.SetLifetime(30 * time.Minute)
	fresh := w.after(w.vault.Client, "sooner", rotatedAt(refused))
	if fresh.Data["access_token"] == refused.Data["access_token"] || number(w, fresh.Data["expires_at_seconds"]) >= number(w, refused.Data["expires_at_seconds"]) {
		t.Errorf("got %v, want a new token that expires sooner than %v", fresh.Data["expires_at"], refused.Data["expires_at"])
	}
	if w.token("sooner") != fresh.Data["access_token"] {
		t.Error("the new token did not replace the refused one")
	}

	// A token minted in the same second as the refused one may be the refused one.
	var first, second *api.Secret
	harness.Eventually(t, "two tokens minted in the same second", func() error {
		first = w.read("creds/second")
		w.write("rotate-role/second", nil)
		second = w.read("creds/second")
		if rotatedAt(first) != rotatedAt(second) {
			return errors.New("they were minted in different seconds")
		}
		return nil
	})
	before := requests()
	third := w.after(w.vault.Client, "second", rotatedAt(first))
	if third.Data["access_token"] == second.Data["access_token"] || requests() != before+1 {
		t.Errorf("a token of the same second counted as newer; %d requests", requests()-before)
	}

	// A token that was minted later is returned.
	refused = w.read("creds/newer")
	time.Sleep(1100 * time.Millisecond)
	w.write("rotate-role/newer", nil)
	before = requests()
	if fresh := w.after(w.vault.Client, "newer", rotatedAt(refused)); fresh.Data["access_token"] == refused.Data["access_token"] || len(fresh.Warnings) != 0 || requests() != before {
		t.Errorf("the existing newer token was not returned: %q, %d requests", fresh.Warnings, requests()-before)
	}

	// With a scope subset.
	query := map[string][]string{"scopes": {"read:data"}}
	refused, err := w.vault.Logical().ReadWithData("mojoauth/creds/narrow", query)
	if err != nil {
		t.Fatal(err)
	}
	whole := w.token("narrow")
	query["minted_after"] = []string{rotatedAt(refused)}
	fresh, err = w.vault.Logical().ReadWithData("mojoauth/creds/narrow", query)
	if err != nil || fresh.Data["access_token"] == refused.Data["access_token"] {
		t.Errorf("scope subset: got the refused token, %v", err)
	}
	if w.token("narrow") != whole {
		t.Error("the token for all scopes was replaced too")
	}
}

// If no newer token is available, the reader gets the cached one in time, with a warning.
func TestMintedAfterWithoutANewerToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"max_retries": 0}))
	for name, fault := range map[string]oauthserver.Faults{
		"throttled":        {Status: 429},
		"throttled-longer": {Status: 429, Header: map[string]string{"Retry-After": "600"}},
		"down":             {Status: 503},
		"slow":             {Latency: oauthserver.Duration(8 * time.Second)},
	} {
		w.oauth.SetFaults(oauthserver.Faults{})
		w.write("config/"+name, w.config(map[string]any{"max_retries": 0, "verify_connection": false}))
		w.write("roles/"+name, role(map[string]any{"config": name}))
		held := w.read("creds/" + name)
		w.oauth.SetFaults(fault)
		began := time.Now()
		got := w.after(w.vault.Client, name, rotatedAt(held))
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("%s: the read took %s, want at most 2s", name, took)
		}
		if got.Data["access_token"] != held.Data["access_token"] || len(got.Warnings) == 0 {
			t.Errorf("%s: got another token, or no warning: %q", name, got.Warnings)
		}
		t.Logf("%s: after %s, got the warning %q", name, time.Since(began).Round(time.Millisecond), got.Warnings)
		if ttl := number(w, got.Data["ttl"]); ttl < 1 || ttl > 60 {
			t.Errorf("%s: a reader with the old token got ttl %d, want 30 to 60", name, ttl)
		}
	}
}

func TestInvalidMintedAfter(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/cold", role(nil))
	held := w.read("creds/app")
	before := len(w.oauth.Requests())
	for _, wrong := range []string{
		"yesterday", "1763999999", "2026-01-01", "2026-01-01 00:00:00Z", "2026-01-01T00:00:00",
		time.Now().Add(time.Hour).UTC().Format(time.RFC3339), "9999-12-31T23:59:59Z",
	} {
		_, err := w.vault.Logical().ReadWithData("mojoauth/creds/app", mintedAfter(wrong))
		w.wantError(err, 400, "minted_after", "last_vault_rotation")
	}
	// The parameter cannot force a mint: an old time is no reason to mint, and neither is
	// an empty one.
	for _, fine := range []string{"", "2001-01-01T00:00:00Z", "2001-01-01T00:00:00+02:00"} {
		if got := w.after(w.vault.Client, "app", fine); got.Data["access_token"] != held.Data["access_token"] || len(got.Warnings) != 0 {
			t.Errorf("minted_after %q: got another token, or the warnings %q", fine, got.Warnings)
		}
	}
	if got := len(w.oauth.Requests()) - before; got != 0 {
		t.Errorf("these reads caused %d requests", got)
	}
	// A role without a token mints one, as always.
	if got := w.after(w.vault.Client, "cold", rotatedAt(held)); got.Data["access_token"] == nil {
		t.Errorf("a role that was never read: got %v", got.Data)
	}
}

// Vault Agent passes it on from a template.
func TestMintedAfterInATemplate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	refused := w.read("creds/app")
	agent := w.vault.StartAgent(t, "after", `path "mojoauth/creds/app" { capabilities = ["read"] }`, `
template {
  contents    = "{{ with secret \"mojoauth/creds/app?minted_after=`+rotatedAt(refused)+`\" }}{{ .Data.access_token }}{{ end }}"
  destination = "%s/token"
}
`)
	var token string
	harness.Eventually(t, "the agent has a token", func() error {
		content, err := os.ReadFile(filepath.Join(agent.Dir, "token"))
		if err == nil && len(content) == 0 {
			err = errors.New("the file is empty")
		}
		token = string(content)
		return err
	})
	if token == refused.Data["access_token"] || token != w.token("app") {
		t.Error("the agent has the refused token, or not the cached one")
	}
}
