// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package scene is what the tests of every consumer start with: a real Vault or OpenBao
// with the engine at mojoauth/, a real OAuth server, and an API that its tokens open.
package scene

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// What the scene's config identifies itself with at the OAuth server.
const (
	ClientID     = "client"
	ClientSecret = "canary-client-secret-52c8"

	pluginName    = "vault-plugin-secrets-mojoauth"
	pluginVersion = "v1.2.3"
)

var (
	serverBinary string
	pluginDir    string
	pluginBinary string
)

// Main builds the plugin, finds the server that SERVER names, runs the tests, and lists
// at the end what they left out. It returns the exit code.
func Main(m *testing.M) int {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "consumers:", err)
		return 1
	}
	return code
}

func run(m *testing.M) (code int, err error) {
	if serverBinary, err = harness.ServerBinary(); err != nil {
		return 0, err
	}
	if pluginDir, err = os.MkdirTemp("", "mojoauth-consumers-plugins-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(pluginDir)
	if pluginBinary, err = harness.BuildPlugin(pluginDir, strings.TrimPrefix(pluginVersion, "v")); err != nil {
		return 0, err
	}
	code = m.Run()
	for _, untested := range harness.Untested() {
		fmt.Println("Not tested:", untested)
	}
	return code, nil
}

// Scene is a server with the engine, and an OAuth server with an API beside it.
type Scene struct {
	testing.TB
	Vault *harness.Vault
	OAuth *oauthserver.Server
}

// New starts a scene whose tokens live for lifetime. Its config is written, and it has
// one role: reports, with these fields more than audience and scope. Everything ends
// with the test.
func New(t testing.TB, lifetime time.Duration, role map[string]any) *Scene {
	t.Helper()
	oauth := startOAuth(t, lifetime)
	s := &Scene{TB: t, OAuth: oauth, Vault: harness.StartVault(t, serverBinary, pluginDir)}
	s.Vault.Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	s.Vault.Enable(t, "mojoauth", pluginName, pluginVersion)
	s.Write("config", configOf(oauth))
	s.Role("reports", role)
	return s
}

// startOAuth starts an OAuth server whose tokens live for lifetime.
func startOAuth(t testing.TB, lifetime time.Duration) *oauthserver.Server {
	t.Helper()
	oauth, err := oauthserver.New(lifetime, oauthserver.Client{
		ID:        ClientID,
		Secret:    ClientSecret,
		Audiences: []string{oauthserver.DataAudience},
		Scopes:    []string{oauthserver.DataScope, "write:data"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := oauth.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { oauth.Close() })
	return oauth
}

// configOf is the fields of a config for an OAuth server.
func configOf(oauth *oauthserver.Server) map[string]any {
	return map[string]any{"token_url": oauth.TokenURL(), "client_id": ClientID, "client_secret": ClientSecret}
}

// Write writes below the engine's mount.
func (s *Scene) Write(path string, data map[string]any) {
	s.Helper()
	if _, err := s.Vault.Logical().Write("mojoauth/"+path, data); err != nil {
		s.Fatalf("writing %s: %v", path, err)
	}
}

// Role writes a role that may call the API, with these fields more.
func (s *Scene) Role(name string, more map[string]any) {
	s.Helper()
	fields := map[string]any{"audience": oauthserver.DataAudience, "scopes": oauthserver.DataScope}
	maps.Copy(fields, more)
	s.Write("roles/"+name, fields)
}

// Policy writes a policy.
func (s *Scene) Policy(name, rules string) {
	s.Helper()
	if err := s.Vault.Sys().PutPolicy(name, rules); err != nil {
		s.Fatalf("policy %s: %v", name, err)
	}
}

// CallAPI calls the API with a token, and returns the status.
func (s *Scene) CallAPI(token string) (int, error) {
	req, err := http.NewRequest(http.MethodGet, s.OAuth.URL()+oauthserver.DataPath, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

// Reads returns how many reads the engine answered, by outcome, and how many tokens it
// minted: the figures of the status path.
func (s *Scene) Reads() (reads map[string]int, mints int) {
	s.Helper()
	status, err := s.Vault.Logical().Read("mojoauth/status")
	if err != nil {
		s.Fatalf("reading status: %v", err)
	}
	var data struct {
		Reads map[string]int `json:"reads"`
		Mints int            `json:"mints"`
	}
	raw, err := json.Marshal(status.Data)
	if err == nil {
		err = json.Unmarshal(raw, &data)
	}
	if err != nil {
		s.Fatalf("status holds %v: %v", status.Data, err)
	}
	return data.Reads, data.Mints
}
