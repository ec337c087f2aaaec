// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package consultemplate tests consul-template, run as a separate program, against a real
// server with the engine.
package consultemplate

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// For this lifetime, F = 4 s and m = 4 s. The roles' min_ttl makes R = 24 s. A token that is
// due therefore remains valid during an outage of a third of a lifetime and the back-off
// after it.
const (
	lifetime = 40 * time.Second
	minTTL   = "24s"
	margin   = 4 * time.Second
)

func TestMain(m *testing.M) { os.Exit(scene.Main(m)) }

// program is a running consul-template.
type program struct {
	dir string
	log string
}

// start starts consul-template with one template per file. templates maps each file to its
// path in Vault, including the query.
func start(s *scene.Scene, templates map[string]string) program {
	s.Helper()
	p := program{dir: s.TempDir()}
	p.log = filepath.Join(p.dir, "consul-template.log")
	token := s.Token("consul-template", `path "mojoauth/creds/*" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }`)
	config := fmt.Sprintf(`
vault {
  address = %q
  retry {
    attempts    = 0
    max_backoff = "1s"
  }
}
`, s.Vault.Address())
	for file, path := range templates {
		config += fmt.Sprintf(`
template {
  contents    = "{{ with secret \"%s\" }}{{ .Data.access_token }}{{ end }}"
  destination = %q
  perms       = "0600"
}
`, path, filepath.Join(p.dir, file))
	}
	configFile := filepath.Join(p.dir, "config.hcl")
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		s.Fatal(err)
	}
	log, err := os.Create(p.log)
	if err != nil {
		s.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(scene.Program(s, "consul-template"), "-config", configFile, "-log-level", "debug")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "VAULT_TOKEN="+token)
	harness.StartProgram(s, cmd)
	for file := range templates {
		harness.Eventually(s, file+" exists", func() error { _, err := p.read(file); return err })
	}
	return p
}

func (p program) read(file string) (string, error) {
	content, err := os.ReadFile(filepath.Join(p.dir, file))
	if err == nil && len(content) == 0 {
		err = errors.New(file + " is empty")
	}
	return string(content), err
}

// scope returns the scope of a token, which is a JWT.
func scope(t testing.TB, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is not a JWT", token)
	}
	var claims struct {
		Scope string `json:"scope"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		t.Fatal(err)
	}
	return claims.Scope
}

// answer is a response to a read, from Vault's audit log.
type answer struct {
	at    time.Time
	ttl   time.Duration
	lease time.Duration // the time left of the token, minus the lease margin
}

// answers returns the successful responses to reads of a role.
func answers(s *scene.Scene, role string) (all []answer) {
	s.Helper()
	audit, err := os.ReadFile(s.Vault.AuditFile)
	if err != nil {
		s.Fatal(err)
	}
	for line := range bytes.Lines(audit) {
		var entry struct {
			Time    time.Time `json:"time"`
			Type    string    `json:"type"`
			Error   string    `json:"error"`
			Request struct {
				Path string `json:"path"`
			} `json:"request"`
			Response struct {
				Data struct {
					TTL       float64 `json:"ttl"`
					ExpiresAt int64   `json:"expires_at_seconds"`
				} `json:"data"`
			} `json:"response"`
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			s.Fatalf("audit log: %v: %s", err, line)
		}
		if entry.Type != "response" || entry.Request.Path != "mojoauth/creds/"+role || entry.Response.Data.TTL == 0 {
			continue
		}
		all = append(all, answer{
			at:    entry.Time,
			ttl:   time.Duration(entry.Response.Data.TTL * float64(time.Second)),
			lease: time.Unix(entry.Response.Data.ExpiresAt, 0).Sub(entry.Time) - margin,
		})
	}
	return all
}

// An application reads its file and calls the API five times a second. The OAuth server is
// down for a third of a lifetime, all roles are rotated, and Vault is sealed. The API refuses
// no call.
func TestKeepsApplicationsSupplied(t *testing.T) {
	s := scene.New(t, lifetime+time.Second, map[string]any{"min_ttl": minTTL}) // because the server rounds down
	s.Role("leased", map[string]any{"min_ttl": minTTL, "generate_lease": true})
	s.Role("both", map[string]any{"min_ttl": minTTL, "scopes": "read:data write:data"})
	templates := map[string]string{
		"reports": "mojoauth/creds/reports",
		"leased":  "mojoauth/creds/leased",
		"both":    "mojoauth/creds/both?scopes=read:data",
	}
	p := start(s, templates)
	if token, err := p.read("both"); err != nil || scope(t, token) != "read:data" {
		t.Errorf("with a query: got %v, a token with the scope %q, want read:data", err, scope(t, token))
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	var calls, refused atomic.Int64
	for file := range templates {
		wg.Go(func() {
			ticker := time.NewTicker(time.Second / 5)
			defer ticker.Stop()
			for {
				select {
				case <-stop:
					return
				case <-ticker.C:
				}
				token, err := p.read(file)
				if err != nil {
					t.Error(err)
					return
				}
				status, err := s.CallAPI(token)
				calls.Add(1)
				if err != nil || status != 200 {
					refused.Add(1)
					t.Errorf("%s: the API returned %d, %v, want 200", file, status, err)
				}
			}
		})
	}

	began := time.Now()
	at := func(share float64) { time.Sleep(time.Until(began.Add(time.Duration(share * float64(lifetime))))) }
	at(1. / 3)
	s.OAuth.SetFaults(oauthserver.Faults{Status: 503})
	at(2. / 3)
	s.OAuth.SetFaults(oauthserver.Faults{})
	at(1.2)
	for file := range templates {
		s.Write("rotate-role/"+file, nil)
	}
	at(1.6)
	if err := s.Vault.Sys().Seal(); err != nil {
		t.Error(err)
	}
	time.Sleep(time.Second)
	s.Vault.Unseal(t)
	unsealed := time.Now()
	at(2.6)
	close(stop)
	wg.Wait()

	t.Logf("%.1f lifetimes of %s: %d calls of the API, %d refused, %d token requests", time.Since(began).Seconds()/lifetime.Seconds(), lifetime, calls.Load(), refused.Load(), len(s.OAuth.Requests()))
	if want := int64(3 * 3 * time.Since(began).Seconds()); calls.Load() < want {
		t.Errorf("got only %d calls, want at least %d", calls.Load(), want)
	}
	for file := range templates {
		reads := answers(s, file)
		if len(reads) < 4 {
			t.Errorf("%s: got %d reads in %.1f lifetimes, want at least 4", file, len(reads), 2.6)
		}
		for n := range len(reads) - 1 {
			after := reads[n+1].at.Sub(reads[n].at)
			log := fmt.Sprintf("%s: ttl %s, lease %s, read again after %s", file, reads[n].ttl, reads[n].lease.Round(time.Second/10), after.Round(time.Second/10))
			sealed := reads[n].at.Before(unsealed) && reads[n+1].at.After(unsealed.Add(-3*time.Second))
			early, late := reads[n].ttl, reads[n].ttl+6*time.Second
			if file == "leased" {
				early, late = reads[n].lease*8/10, reads[n].lease+5*time.Second
			}
			if !sealed && (after < early || after > late) {
				t.Errorf("%s, want %s to %s", log, early, late)
			} else {
				t.Log(log)
			}
		}
	}
	if t.Failed() {
		log, _ := os.ReadFile(p.log)
		t.Logf("consul-template's log:\n%s", log)
	}
}

// consul-template caches one response per path and ignores the query. Templates that read
// one role with different queries all get the token of the first read.
func TestOneAnswerForAllQueries(t *testing.T) {
	s := scene.New(t, time.Hour, map[string]any{"scopes": "read:data write:data"})
	p := start(s, map[string]string{
		"read":  "mojoauth/creds/reports?scopes=read:data",
		"write": "mojoauth/creds/reports?scopes=write:data",
		"all":   "mojoauth/creds/reports",
	})
	tokens := map[string][]string{} // the files that contain each token
	for _, file := range []string{"read", "write", "all"} {
		token, err := p.read(file)
		if err != nil {
			t.Fatal(err)
		}
		tokens[token] = append(tokens[token], fmt.Sprintf("%s (scope %s)", file, scope(t, token)))
	}
	if reads, mints := s.Reads(); len(tokens) != 1 || mints != 1 || reads["minted"] != 1 {
		t.Errorf("got %d tokens: %v; status reports the reads %v and %d mints, want one of each. If consul-template now distinguishes queries, update docs/consumers.md", len(tokens), slices.Collect(maps.Values(tokens)), reads, mints)
	}
}
