// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Lifetime of the tokens: F = 4 s, m = 4 s. The roles' min_ttl of 24 s makes R = 24 s, so
// a token that is due outlasts a server that is down for a third of a lifetime and the
// back-off after that.
const agentTokenLifetime = 40 * time.Second

// Applications call the API five times a second with the token that a real Vault Agent
// keeps in a file for them. They are not rejected once while Vault, the plugin, the OAuth
// server or the agents fail. Each fault has its own Vault and agents, so the faults can
// run in parallel.
//
// AGENT_LIFETIMES sets the number of lifetimes for each fault. The fault recurs in every
// second lifetime. `make soak-agent` uses more than the default of 2.
func TestAgentKeepsApplicationsSupplied(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(w *world, agents map[string]*harness.Agent){
		"Vault is sealed and unsealed": func(w *world, _ map[string]*harness.Agent) {
			if err := w.vault.Sys().Seal(); err != nil {
				w.Error(err)
			}
			time.Sleep(time.Second)
			w.vault.Unseal(w)
		},
		"the plugin is killed": func(w *world, _ map[string]*harness.Agent) {
			w.vault.SignalPlugin(w, pluginBinary, syscall.SIGKILL)
		},
		"the OAuth server is down for a third of a lifetime": func(w *world, _ map[string]*harness.Agent) {
			w.oauth.SetFaults(oauthserver.Faults{Status: 503})
			time.Sleep(agentTokenLifetime / 3)
			w.oauth.SetFaults(oauthserver.Faults{})
		},
		"the agents restart": func(_ *world, agents map[string]*harness.Agent) {
			for _, agent := range agents {
				agent.Restart()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			keepSupplied(t, fault)
		})
	}
}

// keepSupplied lets applications use the tokens that agents keep for them while the fault
// happens.
func keepSupplied(t *testing.T, fault func(w *world, agents map[string]*harness.Agent)) {
	const lifetime = agentTokenLifetime
	count := 2
	if n, err := strconv.Atoi(os.Getenv("AGENT_LIFETIMES")); err == nil {
		count = n
	}
	w := newWorld(t)
	w.oauth.SetLifetime(lifetime + time.Second) // the server rounds down
	w.write("config", w.config(nil))
	w.write("roles/hinted", role(map[string]any{"min_ttl": "24s"}))
	w.write("roles/leased", role(map[string]any{"min_ttl": "24s", "generate_lease": true}))
	policy := func(role string) string {
		return `path "mojoauth/creds/` + role + `" { capabilities = ["read"] }`
	}
	files := func(role string) string {
		return `
template {
  contents    = "{{ with secret \"mojoauth/creds/` + role + `\" }}{{ .Data.access_token }}{{ end }}"
  destination = "%[1]s/token"
  perms       = "0600"
}
template {
  contents    = "{{ with secret \"mojoauth/creds/` + role + `\" }}Authorization: Bearer {{ .Data.access_token }}\n{{ end }}"
  destination = "%[1]s/header"
  perms       = "0600"
}
`
	}
	hinted := w.vault.StartAgent(t, "hinted", policy("hinted"), files("hinted"))
	leased := w.vault.StartAgent(t, "leased", policy("leased"), files("leased"))
	// The agent starts this program with the token in its environment, and restarts it
	// for each new token.
	supervisor := w.vault.StartAgent(t, "supervisor", policy("hinted"), `
env_template "MOJOAUTH_TOKEN" {
  contents = "{{ with secret \"mojoauth/creds/hinted\" }}{{ .Data.access_token }}{{ end }}"
}
exec {
  command                   = ["/bin/sh", "-c", "umask 077; printf %%s \"$MOJOAUTH_TOKEN\" >%[1]s/new && mv %[1]s/new %[1]s/token && exec sleep 3600"]
  restart_on_secret_changes = "always"
  restart_stop_signal       = "SIGTERM"
}
`)
	agents := map[string]*harness.Agent{"hinted": hinted, "leased": leased, "supervisor": supervisor}

	read := func(a *harness.Agent, file string) (string, error) {
		content, err := os.ReadFile(filepath.Join(a.Dir, file))
		if err == nil && len(content) == 0 {
			err = errors.New("the file is empty")
		}
		return string(content), err
	}
	for name, agent := range agents {
		harness.Eventually(t, name+" has a token", func() error { _, err := read(agent, "token"); return err })
		info, err := os.Stat(filepath.Join(agent.Dir, "token"))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: the token's file has mode %v, %v", name, info.Mode(), err)
		}
	}
	for _, agent := range []*harness.Agent{hinted, leased} {
		harness.Eventually(t, "the header's file", func() error { _, err := read(agent, "header"); return err })
		header, _ := read(agent, "header")
		if token, ok := strings.CutPrefix(header, "Authorization: Bearer "); !ok || w.callAPI(strings.TrimSpace(token)) != 200 {
			t.Errorf("the header's file contains %q", header)
		}
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	calls, rejected := map[string]*atomic.Int64{}, map[string]*atomic.Int64{}
	for name, agent := range agents {
		called, refused := &atomic.Int64{}, &atomic.Int64{}
		calls[name], rejected[name] = called, refused
		wg.Go(func() {
			ticker := time.NewTicker(time.Second / 5)
			defer ticker.Stop()
			for {
				select {
				case <-stop:
					return
				case <-ticker.C:
				}
				token, err := read(agent, "token")
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				called.Add(1)
				if status := w.callAPI(token); status != 200 {
					refused.Add(1)
					t.Errorf("%s: the API returned %d at %s", name, status, time.Now().Format(time.TimeOnly))
				}
			}
		})
	}

	began := time.Now()
	for range (count + 1) / 2 {
		begin := time.Now()
		// Not at the beginning, when all tokens are fresh.
		time.Sleep(lifetime / 3)
		t.Logf("the fault happens at %s", time.Now().Format(time.TimeOnly))
		fault(w, agents)
		time.Sleep(time.Until(begin.Add(2 * lifetime)))
	}
	close(stop)
	wg.Wait()

	audit, err := os.ReadFile(w.vault.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	var reads int
	for line := range bytes.Lines(audit) {
		if bytes.Contains(line, []byte(`"type":"response"`)) && bytes.Contains(line, []byte(`"path":"mojoauth/creds/`)) {
			reads++
		}
	}
	lifetimes := time.Since(began).Seconds() / lifetime.Seconds()
	t.Logf("%.1f lifetimes of %s, three agents: %d reads of Vault, %d requests to the OAuth server", lifetimes, lifetime, reads, len(w.oauth.Requests()))
	for name := range agents {
		t.Logf("%s: %d calls of the API, %d rejected", name, calls[name].Load(), rejected[name].Load())
		if float64(calls[name].Load()) < lifetimes*lifetime.Seconds()*3 {
			t.Errorf("%s: only %d calls: too few to show anything", name, calls[name].Load())
		}
		if t.Failed() {
			t.Logf("the log of %s:\n%s", name, agents[name].Log())
		}
	}
	// An agent that ignores the hints reads every five minutes; one that takes ttl for 0
	// reads every second.
	if perLifetime := float64(reads) / 5 / lifetimes; perLifetime > 8 {
		t.Errorf("each template was read %.1f times per lifetime", perLifetime)
	}
	w.noCanary()
}
