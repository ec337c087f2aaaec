// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// scripts/register.sh takes a new binary to a running Vault, and upgrades a mount
// that is there without losing what it keeps.
func TestRegisterScript(t *testing.T) {
	t.Parallel()
	w := &world{TB: t, oauth: startOAuth(t), vault: harness.StartVault(t, vaultBinary, pluginDir)}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	script := func(version string, mount ...string) (output string, err error) {
		t.Helper()
		binary, err := harness.BuildPlugin(pluginDir, version)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(root, "scripts", "register.sh"), append([]string{filepath.Join(pluginDir, binary)}, mount...)...)
		cmd.Env = append(os.Environ(), w.vault.Environment()...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	register := func(version string) {
		t.Helper()
		if out, err := script(version); err != nil {
			t.Fatalf("register.sh: %v\n%s", err, out)
		}
		harness.Eventually(t, "the new version runs", func() error {
			_, err := w.vault.Logical().Read("mojoauth/status")
			return err
		})
		if got := w.read("status").Data["version"]; got != "v"+version {
			t.Errorf("version %v runs, want v%s", got, version)
		}
	}
	register("2.0.0")
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.token("app")
	register("2.1.0")
	w.token("app")
	register("2.0.0") // and back
	w.token("app")

	if out, err := script("2.1.0", "sys"); err == nil || !strings.Contains(out, "at sys/ is an engine of the type system") {
		t.Errorf("another engine's mount: %v\n%s", err, out)
	}
}
