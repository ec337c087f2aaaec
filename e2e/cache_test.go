// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// Not parallel, like all tests that load the machine: tests that wait for time to pass
// run in parallel after these.
func TestManyColdReadersThroughVault(t *testing.T) {
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	before := len(w.oauth.Requests())

	const readers = 2000
	client := w.reader(readers)
	start := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	tokens := make(map[any]int)
	for range readers {
		wg.Go(func() {
			<-start
			secret, err := client.Logical().Read("mojoauth/creds/app")
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			tokens[secret.Data["access_token"]]++
		})
	}
	close(start)
	wg.Wait()
	if len(tokens) != 1 {
		t.Errorf("%d readers got %d different tokens, want one", readers, len(tokens))
	}
	if got := len(w.oauth.Requests()) - before; got != 1 {
		t.Errorf("%d readers caused %d token requests, want 1", readers, got)
	}
}

// reader returns a client for many concurrent goroutines that does not record responses.
func (w *world) reader(connections int) *api.Client {
	w.Helper()
	config := api.DefaultConfig()
	config.Address = w.vault.Address()
	config.MaxRetries = 0
	config.HttpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections, MaxConnsPerHost: connections}}
	client, err := api.NewClient(config)
	if err != nil {
		w.Fatal(err)
	}
	client.SetToken(w.vault.Token())
	w.Cleanup(config.HttpClient.CloseIdleConnections)
	return client
}

// Tokens that are valid for seconds show whether readers that follow the hints ever have
// an expired one. A lifetime of 20 s has F = 2 s, m = 2 s and R = 5 s.
func TestReadersOfShortLivedTokens(t *testing.T) {
	t.Parallel()
	const (
		lifetime  = 20 * time.Second
		floor     = 2 * time.Second
		lifetimes = 5
	)
	w := newWorld(t)
	// The server reports whole seconds and rounds down. With one second more, the
	// reported lifetime is exact.
	w.oauth.SetLifetime(lifetime + time.Second)
	w.write("config", w.config(nil))
	w.write("roles/hinted", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	before := len(w.oauth.Requests())
	client := w.reader(100)

	end := time.Now().Add(lifetimes * lifetime)
	var reads atomic.Int64
	// follow reads the role until the end, and waits between reads as long as wait returns.
	follow := func(role string, wait func(*api.Secret) time.Duration) {
		var token string
		for {
			if token != "" {
				if status := w.callAPI(token); status != http.StatusOK {
					t.Errorf("%s: just before its replacement, the API returned %d for the token", role, status)
					return
				}
			}
			if time.Now().After(end) {
				return
			}
			asked := time.Now()
			secret, err := client.Logical().Read("mojoauth/creds/" + role)
			if err != nil {
				t.Error(err)
				return
			}
			reads.Add(1)
			expires, err := secret.Data["expires_at_seconds"].(json.Number).Int64()
			if err != nil {
				t.Error(err)
				return
			}
			if left := time.Unix(expires, 0).Sub(asked); left <= floor {
				t.Errorf("%s: got a token with %s left, at or below the floor", role, left)
			}
			token = secret.Data["access_token"].(string)
			time.Sleep(wait(secret))
		}
	}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			follow("hinted", func(s *api.Secret) time.Duration {
				ttl, err := s.Data["ttl"].(json.Number).Int64()
				if err != nil || ttl < 1 {
					t.Errorf("got ttl %v", s.Data["ttl"])
					ttl = 1
				}
				return time.Duration(ttl) * time.Second
			})
		})
		fraction := []float64{0.67, 0.85, 0.90, 0.95}[i%4]
		wg.Go(func() {
			follow("leased", func(s *api.Secret) time.Duration {
				if s.LeaseID == "" || s.LeaseDuration < 1 || s.Renewable {
					t.Errorf("got lease %q of %d s, renewable %v", s.LeaseID, s.LeaseDuration, s.Renewable)
				}
				return time.Duration(float64(s.LeaseDuration) * fraction * float64(time.Second))
			})
		})
	}
	wg.Wait()

	mints := 0
	for _, request := range w.oauth.Requests()[before:] {
		if request.At.Before(end) {
			mints++
		}
	}
	perLifetime := float64(mints) / 2 / lifetimes
	t.Logf("%d reads by 100 readers over %d lifetimes of %s; %d mints for two roles: %.2f per lifetime and role", reads.Load(), lifetimes, lifetime, mints, perLifetime)
	// A token is renewed with a quarter of its lifetime left, or up to a twentieth
	// earlier. So a role has its first token, and another one for each 0.70 lifetimes.
	if most := 2 * (1 + lifetimes*100/70); mints > most {
		t.Errorf("%d tokens were minted for two roles, want at most %d", mints, most)
	}
}

func TestRevokingLeasesTouchesNoOtherReader(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(map[string]any{"generate_lease": true}))
	token := w.token("app")
	sys := w.vault.Sys()
	unchanged := func(after string) {
		t.Helper()
		if w.token("app") != token {
			t.Errorf("after %s: got another token", after)
		}
		if status := w.callAPI(token); status != http.StatusOK {
			t.Errorf("after %s: the API returned %d", after, status)
		}
	}

	secret := w.read("creds/app")
	if secret.LeaseID == "" || secret.Renewable || secret.LeaseDuration > 3600-300 || secret.LeaseDuration < 3200 {
		t.Errorf("got lease %q of %d s, renewable %v; want one that ends 5 minutes before the token expires", secret.LeaseID, secret.LeaseDuration, secret.Renewable)
	}
	if err := sys.Revoke(secret.LeaseID); err != nil {
		t.Errorf("revoking one lease: %v", err)
	}
	unchanged("revoking one lease")

	w.read("creds/app")
	if err := sys.RevokePrefix("mojoauth/creds/app"); err != nil {
		t.Errorf("revoking by prefix: %v", err)
	}
	unchanged("revoking by prefix")

	if err := sys.PutPolicy("app", `path "mojoauth/creds/app" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	child, err := w.vault.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"app"}})
	if err != nil {
		t.Fatal(err)
	}
	application, err := w.vault.Clone()
	if err != nil {
		t.Fatal(err)
	}
	application.SetToken(child.Auth.ClientToken)
	if _, err := application.Logical().Read("mojoauth/creds/app"); err != nil {
		t.Fatal(err)
	}
	if _, err := application.Logical().Read("mojoauth/config"); err == nil {
		t.Error("an application's policy allows reading the config")
	}
	if err := w.vault.Auth().Token().RevokeTree(child.Auth.ClientToken); err != nil {
		t.Errorf("revoking the parent token: %v", err)
	}
	unchanged("revoking the parent token")

	// A lease outlives the role and config it came from.
	orphan := w.read("creds/app").LeaseID
	for _, path := range []string{"roles/app", "config"} {
		if _, err := w.vault.Logical().Delete("mojoauth/" + path); err != nil {
			t.Fatal(err)
		}
	}
	if err := sys.RevokeWithOptions(&api.RevokeOptions{LeaseID: orphan, Sync: true}); err != nil {
		t.Errorf("revoking a lease of a deleted role and config: %v", err)
	}
	if _, err := sys.Lookup(orphan); err == nil {
		t.Error("the lease still exists")
	}
}

func TestRotateRoleThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"max_retries": 0}))
	w.write("roles/app", role(nil))
	old := w.token("app")
	rotated := w.write("rotate-role/app", nil)
	if len(rotated.Data) != 3 || rotated.Data["access_token"] != nil {
		t.Errorf("got %v, want three keys and no token", rotated.Data)
	}
	if w.token("app") == old {
		t.Error("the old token is still served")
	}
	current := w.token("app")
	w.oauth.Close()
	_, err := w.vault.Logical().Write("mojoauth/rotate-role/app", nil)
	w.wantError(err, 502, `role "app"`, "connection refused")
	if w.token("app") != current {
		t.Error("a failed rotation dropped the token")
	}
}

func TestNarrowedReadsThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(map[string]any{"scopes": "read:data,write:data"}))
	read := func(query map[string][]string) *api.Secret {
		t.Helper()
		secret, err := w.vault.Logical().ReadWithData("mojoauth/creds/app", query)
		if err != nil {
			t.Fatal(err)
		}
		return secret
	}
	if got := read(map[string][]string{"scopes": {"write:data"}}); got.Data["scope"] != "write:data" || w.callAPI(got.Data["access_token"].(string)) != http.StatusForbidden {
		t.Errorf("got scope %v, want a token with only write:data", got.Data["scope"])
	}
	all := read(map[string][]string{"scopes": {""}})
	if got := read(map[string][]string{"scopes": {"write:data read:data"}}); got.Data["access_token"] != all.Data["access_token"] {
		t.Error("all scopes in another order: got another token")
	}
	if got := read(map[string][]string{"min_ttl": {"30m"}}); got.Data["access_token"] != all.Data["access_token"] || number(w, got.Data["rotation_period"]) > 1800 {
		t.Errorf("got %v, want the same token with an earlier next read", got.Data)
	}
	_, err := w.vault.Logical().ReadWithData("mojoauth/creds/app", map[string][]string{"scopes": {"read:data,admin"}})
	w.wantError(err, 400, `scopes contains "admin"`, `role "app"`)
}

// Platform teams size Vault's hosts by this: 10,000 roles with a token of 1.5 KB each.
func TestMemoryOfManyRoles(t *testing.T) {
	harness.Once(t)
	const (
		roles = 10_000
		limit = 80 << 20
	)
	w := newWorld(t)
	w.oauth.SetPadding(900) // in addition to the 600 bytes of any token
	w.write("config", w.config(unpaced(nil)))
	w.write("roles/first", role(nil))
	if size := len(w.token("first")); size < 1500 || size > 1700 {
		t.Errorf("got a token of %d bytes, want about 1.5 KB", size)
	}
	client := w.reader(32)
	each := func(do func(i int) error) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range 32 {
			wg.Go(func() {
				for i := next.Add(1); i <= roles && !t.Failed(); i = next.Add(1) {
					if err := do(int(i)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	// Memory that the plugin needs to handle many requests is not memory that it keeps.
	each(func(int) error {
		_, err := client.Logical().Read("mojoauth/creds/first")
		return err
	})
	pid := w.vault.PluginProcesses(t, pluginBinary)[0]
	before := residentMemory(t, pid)
	each(func(i int) error {
		_, err := client.Logical().Write(fmt.Sprintf("mojoauth/roles/role%d", i), role(nil))
		return err
	})
	each(func(i int) error {
		_, err := client.Logical().Read(fmt.Sprintf("mojoauth/creds/role%d", i))
		return err
	})
	grown := residentMemory(t, pid) - before
	t.Logf("resident memory of the plugin: %.1f MiB before, grown by %.1f MiB with %d roles", float64(before)/(1<<20), float64(grown)/(1<<20), roles)
	if grown > limit {
		t.Errorf("memory grew by %d bytes, want at most %d", grown, limit)
	}
}

func residentMemory(t testing.TB, pid int) int64 {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
