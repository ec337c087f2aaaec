// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// register runs scripts/register.sh with the Vault's root token.
func register(t *testing.T, vault *harness.Vault, args ...string) (output string, err error) {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(root, "scripts", "register.sh"), args...)
	cmd.Env = append(os.Environ(), vault.Environment()...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func sha256Of(t testing.TB, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(content))
}

// scripts/register.sh installs a new binary in a running Vault, and upgrades an existing
// mount without losing its data.
func TestRegisterScript(t *testing.T) {
	t.Parallel()
	w := &world{TB: t, oauth: startOAuth(t), vault: harness.StartVault(t, vaultBinary, pluginDir)}
	upgrade := func(version string, sum func(binary string) string) {
		t.Helper()
		name, err := harness.BuildPlugin(pluginDir, version)
		if err != nil {
			t.Fatal(err)
		}
		binary := filepath.Join(pluginDir, name)
		if out, err := register(t, w.vault, sum(binary), binary); err != nil {
			t.Fatalf("register.sh: %v\n%s", err, out)
		}
		harness.Eventually(t, "the new version runs", func() error {
			_, err := w.vault.Logical().Read("mojoauth/status")
			return err
		})
		if got := w.read("status").Data["version"]; got != "v"+version {
			t.Errorf("got version %v, want v%s", got, version)
		}
	}
	inFile := func(binary string) string {
		sums := filepath.Join(t.TempDir(), "SHA256SUMS")
		text := fmt.Sprintf("%064x  other\n%s *%s\n", 1, sha256Of(t, binary), filepath.Base(binary))
		if err := os.WriteFile(sums, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return sums
	}
	upgrade("2.0.0", func(binary string) string { return sha256Of(t, binary) })
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.token("app")
	upgrade("2.1.0", inFile)
	w.token("app")
	upgrade("2.0.0", func(binary string) string { return strings.ToUpper(sha256Of(t, binary)) }) // and a rollback
	w.token("app")

	binary := filepath.Join(pluginDir, pluginBinary)
	if out, err := register(t, w.vault, sha256Of(t, binary), binary, "sys"); err == nil || !strings.Contains(out, "sys/ has an engine of type system") {
		t.Errorf("another engine's mount: %v\n%s", err, out)
	}
}

// A binary runs only if it is the verified one, and without the token used to register
// it.
func TestRegisterScriptRunsNothingUnverified(t *testing.T) {
	t.Parallel()
	vault := harness.StartVault(t, vaultBinary, pluginDir)
	dir := t.TempDir()
	binary, ran := filepath.Join(dir, "plugin"), filepath.Join(dir, "ran")
	program := fmt.Sprintf("#!/bin/sh\n/usr/bin/env >%q\necho plugin v9.9.9\n", ran)
	if err := os.WriteFile(binary, []byte(program), 0o700); err != nil {
		t.Fatal(err)
	}
	sum := sha256Of(t, binary)
	sums := func(lines string) string {
		file := filepath.Join(t.TempDir(), "SHA256SUMS")
		if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	other := fmt.Sprintf("%064x", 1)
	for what, c := range map[string]struct {
		args []string
		text string
	}{
		"no sum":                   {[]string{binary}, "SUM BINARY"},
		"no sum, with a mount":     {[]string{binary, "mojoauth"}, "is not an executable file"},
		"another sum":              {[]string{other, binary}, "not run, and not registered"},
		"a short sum":              {[]string{sum[:63], binary}, "64 hexadecimal digits"},
		"no sum at all":            {[]string{"", binary}, "neither a SHA-256 nor a file"},
		"a file without its sum":   {[]string{sums(sum + "  other\n"), binary}, "has no checksum of plugin"},
		"a file with another sum":  {[]string{sums(other + "  plugin\n"), binary}, "not run, and not registered"},
		"a file with two sums":     {[]string{sums(sum + "  plugin\n" + other + "  plugin\n"), binary}, "does not have one SHA-256"},
		"a file without such sums": {[]string{sums("x  plugin\n"), binary}, "does not have one SHA-256"},
	} {
		out, err := register(t, vault, c.args...)
		if err == nil || !strings.Contains(out, c.text) {
			t.Errorf("%s: got %v, want it to fail with %q\n%s", what, err, c.text, out)
		}
		if _, err := os.Stat(ran); err == nil {
			t.Fatalf("%s: the binary was run", what)
		}
	}
	if _, err := vault.Sys().MountConfig("mojoauth"); err == nil {
		t.Error("the plugin was enabled")
	}

	// This program runs, but cannot be enabled, because it is not a plugin.
	if out, err := register(t, vault, sum, binary); err == nil {
		t.Errorf("a program that is not a plugin was enabled\n%s", out)
	}
	env, err := os.ReadFile(ran)
	if err != nil {
		t.Fatalf("the verified binary was not run: %v", err)
	}
	if text := string(env); strings.Contains(text, "VAULT") || strings.Contains(text, "HOME=") || strings.Contains(text, vault.Token()) {
		t.Errorf("the binary saw the environment:\n%s", text)
	}
}

// scripts/register.sh uses the command of the product that the user has.
func TestRegisterScriptChoosesTheCommand(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("sha256sum"); err != nil {
		harness.Missing(t, "sha256sum is not on PATH; not testing scripts/register.sh")
	}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile(filepath.Join(root, "scripts", "register.sh"))
	if err != nil {
		t.Fatal(err)
	}
	const vaultAddr, baoAddr = "VAULT_ADDR=http://127.0.0.1:8200", "BAO_ADDR=http://127.0.0.1:8200"
	for name, c := range map[string]struct {
		onPath []string
		env    []string // %s is the directory of a vault and a bao that are not on PATH
		want   string
	}{
		"a Vault":                            {[]string{"vault"}, nil, "vault on PATH"},
		"an OpenBao":                         {[]string{"bao"}, nil, "bao on PATH"},
		"an OpenBao, with Vault's variables": {[]string{"bao"}, []string{vaultAddr}, "bao on PATH"},
		"both":                               {[]string{"vault", "bao"}, nil, "vault on PATH"},
		"both, and the address of OpenBao":   {[]string{"vault", "bao"}, []string{baoAddr}, "bao on PATH"},
		"both, and both addresses":           {[]string{"vault", "bao"}, []string{baoAddr, vaultAddr}, "vault on PATH"},
		"VAULT_BIN":                          {[]string{"vault", "bao"}, []string{"VAULT_BIN=%s/vault"}, "vault elsewhere"},
		"BAO_BIN":                            {[]string{"vault", "bao"}, []string{"BAO_BIN=%s/bao"}, "bao elsewhere"},
		"VAULT_BIN and BAO_BIN":              {nil, []string{"VAULT_BIN=%s/vault", "BAO_BIN=%s/bao"}, "vault elsewhere"},
		"neither":                            {nil, nil, "neither vault nor bao is on PATH"},
		"a BAO_BIN that does not exist":      {[]string{"vault"}, []string{"BAO_BIN=/nowhere"}, "/nowhere is not executable"},
	} {
		m := newBareMachine(t)
		m.write(filepath.Join(m.root, "scripts", "register.sh"), string(script), 0o700)
		m.link("sha256sum")
		elsewhere := t.TempDir()
		for _, command := range c.onPath {
			m.fake(command, "echo "+command+" on PATH: $1 >&2; exit 1")
		}
		for _, command := range []string{"vault", "bao"} {
			m.fake(filepath.Join(elsewhere, command), "echo "+command+" elsewhere: $1 >&2; exit 1")
		}
		plugin := m.fake(filepath.Join(elsewhere, "plugin"), "echo plugin v9.9.9")
		cmd := exec.CommandContext(t.Context(), filepath.Join(m.root, "scripts", "register.sh"), sha256Of(t, plugin), plugin)
		cmd.Env = []string{"PATH=" + m.bin}
		for _, variable := range c.env {
			cmd.Env = append(cmd.Env, strings.ReplaceAll(variable, "%s", elsewhere))
		}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%s: got %v, want %q\n%s", name, err, c.want, out)
		}
	}
}
