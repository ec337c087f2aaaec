// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package scene sets up what all consumer tests need: a real Vault or OpenBao server with
// the engine at mojoauth/, a real OAuth server, and an API that accepts its tokens.
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

// ClientID and ClientSecret are the credentials in the scene's config.
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

// Main builds the plugin, finds the server that SERVER names, runs the tests, and then
// lists what they did not test. It returns the exit code.
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

// Scene is a Vault or OpenBao server with the engine enabled, and an OAuth server that also
// serves an API.
type Scene struct {
	testing.TB
	Vault *harness.Vault
	OAuth *oauthserver.Server
}

// New starts a scene whose tokens have the given lifetime. It writes the config and one
// role, reports, with the given fields in addition to audience and scopes. Everything stops
// when the test ends.
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

// startOAuth starts an OAuth server whose tokens have the given lifetime.
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

// configOf returns the config fields for an OAuth server.
func configOf(oauth *oauthserver.Server) map[string]any {
	return map[string]any{"token_url": oauth.TokenURL(), "client_id": ClientID, "client_secret": ClientSecret}
}

// Write writes to a path under the engine's mount.
func (s *Scene) Write(path string, data map[string]any) {
	s.Helper()
	if _, err := s.Vault.Logical().Write("mojoauth/"+path, data); err != nil {
		s.Fatalf("writing %s: %v", path, err)
	}
}

// Role writes a role whose tokens the API accepts, with the given additional fields.
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
		s.Fatalf("writing the policy %s: %v", name, err)
	}
}

// CallAPI calls the API with a token and returns the status.
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

// Reads returns the number of reads by outcome and the number of mints, as the status path
// reports them.
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
		s.Fatalf("decoding status %v: %v", status.Data, err)
	}
	return data.Reads, data.Mints
}
