// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// Vault's own commands show the plugin's version.
func TestVersionsInVaultsCommands(t *testing.T) {
	t.Parallel()
	vault := harness.StartVault(t, vaultBinary, pluginDir)
	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(content)
	sum := hex.EncodeToString(digest[:])
	cli := func(args ...string) string {
		t.Helper()
		out, err := vault.CLI(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	register := []string{"plugin", "register", "-sha256=" + sum, "-command=" + pluginBinary}

	// Vault refuses a version other than the binary's own.
	if out, err := vault.CLI(t.Context(), append(register, "-version=v9.9.9", "secret", pluginName)...); err == nil || !strings.Contains(err.Error(), "version mismatch") {
		t.Errorf("registering %s as v9.9.9: got %v\n%s", pluginVersion, err, out)
	}
	cli(append(register, "-version="+pluginVersion, "secret", pluginName)...)

	var info map[string]any
	if err := json.Unmarshal([]byte(cli("plugin", "info", "-format=json", "-version="+pluginVersion, "secret", pluginName)), &info); err != nil {
		t.Fatal(err)
	}
	if info["version"] != pluginVersion || info["sha256"] != sum || info["builtin"] != false || info["deprecation_status"] != nil && info["deprecation_status"] != "" {
		t.Errorf("vault plugin info: %v", info)
	}

	cli("secrets", "enable", "-path=chosen", "-plugin-version="+pluginVersion, pluginName)
	paths := []string{"chosen/"}
	t.Run("a pinned version", func(t *testing.T) {
		harness.NoPluginPins.Skip(t, vault.Product)
		// All mounts run the pinned version; from then on, none may name one.
		cli("write", "sys/plugins/pins/secret/"+pluginName, "version="+pluginVersion)
		cli("secrets", "enable", "-path=pinned", pluginName)
		paths = append(paths, "pinned/")
		if _, err := vault.CLI(t.Context(), "secrets", "enable", "-path=other", "-plugin-version="+pluginVersion, pluginName); err == nil || !strings.Contains(err.Error(), "pinned") {
			t.Errorf("naming a version in addition to the pinned one: %v", err)
		}
	})
	var mounts map[string]struct {
		Type    string `json:"type"`
		Running string `json:"running_plugin_version"`
		SHA256  string `json:"running_sha256"`
	}
	if err := json.Unmarshal([]byte(cli("secrets", "list", "-detailed", "-format=json")), &mounts); err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if got := mounts[path]; got.Type != pluginName || got.Running != pluginVersion || got.SHA256 != sum {
			t.Errorf("vault secrets list -detailed shows for %s: %+v", path, got)
		}
		if out := cli("read", "-field=version", path+"status"); strings.TrimSpace(out) != pluginVersion {
			t.Errorf("%sstatus has version %s", path, out)
		}
	}
}

// A run lists skipped tests with the reason, which requires harness.Skip.
func TestSkipsAreListed(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %v, %v", files, err)
	}
	unlisted := regexp.MustCompile(`\b(?:[a-z]|TB)\.Skip(?:f|Now)?\(`)
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if call := unlisted.FindString(string(content)); call != "" {
			t.Errorf("%s calls %s: use harness.Skip, or harness.Missing", file, call)
		}
	}
}
