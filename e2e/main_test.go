// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package e2e tests the engine as users see it: the plugin binary in a real Vault or
// OpenBao, which gets tokens from a real OAuth server.
package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

const (
	pluginName    = "vault-plugin-secrets-mojoauth"
	pluginVersion = "v1.2.3"

	clientID = "client"
	// canary is the client secret, which must not turn up anywhere.
	canary = "canary-client-secret-52c8"
)

var (
	vaultBinary  string // or OpenBao's
	pluginDir    string
	pluginBinary string
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	var err error
	if vaultBinary, err = harness.ServerBinary(); err != nil {
		return fail(err)
	}
	if pluginDir, err = os.MkdirTemp("", "mojoauth-e2e-plugins-"); err != nil {
		return fail(err)
	}
	defer os.RemoveAll(pluginDir)
	if pluginBinary, err = harness.BuildPlugin(pluginDir, strings.TrimPrefix(pluginVersion, "v")); err != nil {
		return fail(err)
	}
	code := m.Run()
	if err := reportUntested(); err != nil {
		return fail(err)
	}
	return code
}

// reportUntested lists what was not tested and why, on standard output and in the file
// that E2E_UNTESTED names. The file is for running the tests in more than one server.
func reportUntested() error {
	product, version, err := harness.ProductOf(vaultBinary)
	if err != nil {
		return err
	}
	list := strings.Join(harness.Untested(), "\n  ")
	if list == "" {
		return nil
	}
	list = fmt.Sprintf("Not tested in %s %s:\n  %s\n", product, version, list)
	fmt.Print(list)
	if file := os.Getenv("E2E_UNTESTED"); file != "" {
		return os.WriteFile(file, []byte(list), 0o600)
	}
	return nil
}

// world is a Vault with the engine at mojoauth/, and an OAuth server.
type world struct {
	testing.TB
	vault *harness.Vault
	oauth *oauthserver.Server
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldIn(t, harness.StartVault(t, vaultBinary, pluginDir))
}

// newWorldIn creates a world in the given Vault.
func newWorldIn(t testing.TB, vault *harness.Vault) *world {
	t.Helper()
	w := &world{TB: t, oauth: startOAuth(t), vault: vault}
	w.vault.Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	w.vault.Enable(t, "mojoauth", pluginName, pluginVersion)
	return w
}

func startOAuth(t testing.TB) *oauthserver.Server {
	t.Helper()
	return startOAuthFor(t, demoClient(clientID, canary))
}

// startOAuthFor starts an OAuth server with the given clients. Tokens are valid for an
// hour unless the client sets another lifetime.
func startOAuthFor(t testing.TB, clients ...oauthserver.Client) *oauthserver.Server {
	t.Helper()
	server, err := oauthserver.New(time.Hour, clients...)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server
}

func demoClient(id, secret string) oauthserver.Client {
	return oauthserver.Client{
		ID:        id,
		Secret:    secret,
		Audiences: []string{oauthserver.DataAudience},
		Scopes:    []string{oauthserver.DataScope, "write:data"},
	}
}

// config returns the fields of a config for the world's OAuth server.
func (w *world) config(more map[string]any) map[string]any {
	data := map[string]any{
		"token_url":     w.oauth.TokenURL(),
		"client_id":     clientID,
		"client_secret": canary,
	}
	for k, v := range more {
		data[k] = v
	}
	return data
}

// unpaced returns the fields of a config for a test that is not about the pace.
func unpaced(more map[string]any) map[string]any {
	data := map[string]any{"max_requests_per_second": 1000}
	for k, v := range more {
		data[k] = v
	}
	return data
}

// role returns the fields of a role whose token the protected API accepts.
func role(more map[string]any) map[string]any {
	data := map[string]any{"audience": oauthserver.DataAudience, "scopes": oauthserver.DataScope}
	for k, v := range more {
		data[k] = v
	}
	return data
}

func (w *world) write(path string, data map[string]any) *api.Secret {
	w.Helper()
	secret, err := w.vault.Logical().Write("mojoauth/"+path, data)
	if err != nil {
		w.Fatalf("writing %s: %v", path, err)
	}
	return secret
}

func (w *world) read(path string) *api.Secret {
	w.Helper()
	secret, err := w.vault.Logical().Read("mojoauth/" + path)
	if err != nil {
		w.Fatalf("reading %s: %v", path, err)
	}
	if secret == nil {
		w.Fatalf("reading %s: no data", path)
	}
	return secret
}

// token reads a token of the role.
func (w *world) token(role string) string {
	w.Helper()
	token, ok := w.read("creds/" + role).Data["access_token"].(string)
	if !ok || token == "" {
		w.Fatalf("creds/%s has no access_token", role)
	}
	return token
}

// callAPI calls the protected API, and returns the status.
func (w *world) callAPI(token string) int {
	w.Helper()
	status, err := callAPI(w.oauth, token)
	if err != nil {
		w.Fatal(err)
	}
	return status
}

// callAPI calls the protected API of an OAuth server, and returns the status.
func callAPI(server *oauthserver.Server, token string) (int, error) {
	req, err := http.NewRequest(http.MethodGet, server.URL()+oauthserver.DataPath, nil)
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

// wantError checks that err is Vault's response with the given status and an error that
// contains all parts.
func (w *world) wantError(err error, status int, parts ...string) {
	w.Helper()
	var answer *api.ResponseError
	if !errors.As(err, &answer) {
		w.Errorf("got %v, want Vault's status %d", err, status)
		return
	}
	if answer.StatusCode != status {
		w.Errorf("got status %d, want %d: %v", answer.StatusCode, status, answer.Errors)
	}
	text := strings.Join(answer.Errors, "\n")
	for _, part := range parts {
		if !strings.Contains(text, part) {
			w.Errorf("got %q, want it to contain %q", text, part)
		}
	}
}

func number(w *world, v any) int64 {
	w.Helper()
	n, ok := v.(json.Number)
	if !ok {
		w.Fatalf("got %v (%T), want a JSON number", v, v)
	}
	i, err := n.Int64()
	if err != nil {
		w.Fatalf("got %v, want an integer", n)
	}
	return i
}
