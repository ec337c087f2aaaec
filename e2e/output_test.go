// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The CLI formats some values differently from the API. docs/api.md lists them.
func TestOutputOfTheCLI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(map[string]any{"min_ttl": "10m", "max_ttl": "12h"}))
	cli := func(args ...string) string {
		t.Helper()
		out, err := w.vault.CLI(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for path, rows := range map[string]map[string]string{
		"creds/app": {"ttl": `4[0-9]m([0-9]+s)?`, "rotation_period": `4[45]m(59s)?`, "expires_at_seconds": `[0-9]+`},
		"roles/app": {"min_ttl": `10m`, "max_ttl": `12h`},
		"config":    {"request_timeout": `10`, "max_retries": `2`, "ca_cert": `n/a`},
	} {
		out := cli("read", "mojoauth/"+path)
		for key, value := range rows {
			if !regexp.MustCompile(`(?m)^` + key + ` +` + value + `$`).MatchString(out) {
				t.Errorf("read %s: got no row %s %s:\n%s", path, key, value, out)
			}
		}
		out = cli("read", "-format=json", "mojoauth/"+path)
		for key := range rows {
			if key != "ca_cert" && !regexp.MustCompile(`"`+key+`": [0-9]+`).MatchString(out) {
				t.Errorf("read -format=json %s: got no number for %s:\n%s", path, key, out)
			}
		}
	}
	if got := strings.TrimSpace(cli("read", "-field=max_ttl", "mojoauth/roles/app")); got != "43200" {
		t.Errorf("read -field=max_ttl: got %q, want 43200", got)
	}
	if out, err := w.vault.CLI(t.Context(), "read", "mojoauth/metrics"); err == nil || !strings.Contains(err.Error(), "invalid character '#' looking for beginning of value") {
		t.Errorf("read metrics: got %q, %v, want a JSON error", out, err)
	}
	if out, err := w.vault.CLI(t.Context(), "read", "mojoauth/roles/nobody"); err == nil || !strings.Contains(out+err.Error(), "No value found at mojoauth/roles/nobody") {
		t.Errorf("reading a role that does not exist: got %q, %v, want no value found", out, err)
	}
}

// docs/troubleshooting.md lists these error messages of Vault itself.
func TestTextsOfVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	for _, c := range []struct {
		method, path string
		status       int
		text         string
	}{
		{http.MethodGet, "/v1/mojoauth/nowhere", http.StatusNotFound, "unsupported path"},
		{http.MethodPost, "/v1/mojoauth/creds/app", http.StatusMethodNotAllowed, "unsupported operation"},
		{http.MethodGet, "/v1/mojoauth/rotate-role/app", http.StatusMethodNotAllowed, "unsupported operation"},
		{http.MethodGet, "/v1/nowhere/creds/app", http.StatusNotFound, "no handler for route"},
		{http.MethodGet, "/v1/mojoauth/roles/nobody", http.StatusNotFound, `{"errors":[]}`},
		{http.MethodGet, "/v1/mojoauth/creds/app?scope=x", http.StatusOK, `"warnings":["Endpoint ignored these unrecognized parameters: [scope]"]`},
		{http.MethodGet, "/v1/mojoauth/creds/nobody", http.StatusBadRequest, `{"errors":["role \"nobody\" does not exist`},
	} {
		got := ask(t, w.vault.Client, c.method, c.path, "")
		if got.status != c.status || !strings.Contains(got.body, c.text) {
			t.Errorf("%s %s: got %d %s, want %d %s", c.method, c.path, got.status, got.body, c.status, c.text)
		}
	}
	w.write("config/dead", w.config(map[string]any{"token_url": "http://127.0.0.1:1/", "verify_connection": false, "max_retries": 0}))
	w.write("roles/dead", role(map[string]any{"config": "dead"}))
	if got := ask(t, w.vault.Client, http.MethodGet, "/v1/mojoauth/creds/dead", ""); got.status != http.StatusBadGateway || !strings.Contains(got.body, `{"errors":["1 error occurred:\n\t* no token for role \"dead\"`) {
		t.Errorf("an endpoint that refuses connections: got %+v, want 502 and the engine's error", got)
	}

	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(content)
	right, wrong := hex.EncodeToString(digest[:]), strings.Repeat("0", 64)
	register := func(sum, command, version, name string) []string {
		return []string{"plugin", "register", "-sha256=" + sum, "-command=" + command, "-version=" + version, "secret", name}
	}
	if out, err := w.vault.CLI(t.Context(), register(wrong, pluginBinary, pluginVersion, "checksum")...); err != nil {
		t.Errorf("registering a wrong checksum: got %q, %v, want no error until the plugin is enabled", out, err)
	}
	for _, c := range []struct {
		what string
		args []string
		text string
	}{
		{"enabling a plugin that is not registered", []string{"secrets", "enable", "-path=other", "nowhere"}, "plugin not found in the catalog"},
		{"enabling a version that is not registered", []string{"secrets", "enable", "-path=other", "-plugin-version=v9.9.9", pluginName}, "plugin not found in the catalog"},
		{"registering a binary that does not exist", register(right, "nowhere", pluginVersion, "nowhere"), "error while validating the command path"},
		{"enabling a plugin with a wrong checksum", []string{"secrets", "enable", "-path=other", "checksum"}, "checksums did not match"},
		{"registering a wrong version", register(right, pluginBinary, "v9.9.9", pluginName), "version mismatch"},
	} {
		out, err := w.vault.CLI(t.Context(), c.args...)
		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %q, %v, want %q", c.what, out, err, c.text)
		}
	}
}
