// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// setupCommands are the blocks of commands beneath a heading of docs/setup.md.
func setupCommands(t *testing.T, heading string) (blocks []string) {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "setup.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(doc), "\n"+heading+"\n")
	if !found {
		t.Fatalf("docs/setup.md has no %q", heading)
	}
	section = regexp.MustCompile(`(?m)^##+ `).Split(section, 2)[0]
	for _, block := range regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$").FindAllStringSubmatch(section, -1) {
		blocks = append(blocks, regexp.MustCompile("(?m)^   ").ReplaceAllString(block[1], ""))
	}
	if len(blocks) == 0 {
		t.Fatalf("docs/setup.md has no commands beneath %q", heading)
	}
	return blocks
}

// The commands that look up the token URL find it in a discovery document.
func TestSetupLooksUpTheTokenURL(t *testing.T) {
	t.Parallel()
	oauth := startOAuth(t)
	const tenant = "https://your-app.mojoauth.com"
	for _, block := range setupCommands(t, "### Find the token URL") {
		tool := "sed"
		if strings.Contains(block, "jq ") {
			tool = "jq"
		}
		t.Run(tool, func(t *testing.T) {
			for _, tool := range []string{"bash", "curl", tool} {
				if _, err := exec.LookPath(tool); err != nil {
					harness.Missing(t, "%s is not on PATH: looking up the token URL with it is not tested", tool)
				}
			}
			script := replaced(t, block, map[string]string{tenant: oauth.URL()})
			out, err := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script).CombinedOutput()
			if err != nil || string(out) != oauth.TokenURL()+"\n" {
				t.Errorf("got %v, want %s\n%s", err, oauth.TokenURL(), out)
			}
		})
	}
}

// After the documented commands nothing of the engine is left in the server. MojoAuth is
// not asked, and tokens that were read are still valid.
func TestSetupUninstalls(t *testing.T) {
	t.Parallel()
	plugins := t.TempDir()
	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(plugins, pluginName)
	if err := os.WriteFile(binary, content, 0o700); err != nil {
		t.Fatal(err)
	}
	w := &world{TB: t, oauth: startOAuth(t), vault: harness.StartVault(t, vaultBinary, plugins)}
	w.vault.Register(t, plugins, pluginName, pluginName, pluginVersion)
	w.vault.Enable(t, "mojoauth", pluginName, pluginVersion)
	environment := []string{"NAME=" + pluginName, "VERSION=" + strings.TrimPrefix(pluginVersion, "v"), "PLUGIN_DIR=" + plugins}
	check := strings.Join(setupCommands(t, "## Verify the installation"), "")
	if out, err := w.script(check, environment...); err != nil || strings.Count(out, pluginVersion) < 2 || !strings.Contains(out, sha256Of(t, binary)) {
		t.Errorf("the verification: got %v, want the version twice, and the checksum\n%s", err, out)
	}

	w.write("config", w.config(nil))
	w.write("roles/reports", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	w.policy("reports", `path "mojoauth/creds/reports" { capabilities = ["read"] }`)
	tokens := []string{w.token("reports")}
	leased := w.read("creds/leased")
	tokens = append(tokens, leased.Data["access_token"].(string))
	if leased.LeaseID == "" {
		t.Fatal("there is no lease")
	}
	awaitStored(t, w.vault, "the tokens are stored", "default/reports", "default/leased")
	storage := w.vault.StorageOf(t, "mojoauth")
	requests := len(w.oauth.Requests())

	out, err := w.script(strings.Join(setupCommands(t, "## Uninstall"), ""), environment...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := len(w.oauth.Requests()) - requests; got != 0 {
		t.Errorf("the OAuth server got %d requests, want none", got)
	}
	for _, token := range tokens {
		if status := w.callAPI(token); status != 200 {
			t.Errorf("a token that was read before: status %d, want 200", status)
		}
	}
	if secret, err := w.vault.Sys().Lookup(leased.LeaseID); err == nil {
		t.Errorf("the lease is still there: %v", secret)
	}
	if stored, err := w.vault.Stored(storage); err != nil || len(stored) != 0 {
		t.Errorf("stored: %v, %v; want nothing", stored, err)
	}
	if mounts, err := w.vault.Sys().ListMounts(); err != nil || mounts["mojoauth/"] != nil {
		t.Errorf("the mounts: %v, %v", mounts, err)
	}
	if list, err := w.vault.CLI(t.Context(), "plugin", "list", "secret"); err != nil || strings.Contains(list, pluginName) {
		t.Errorf("the plugin is in the catalog: %v\n%s", err, list)
	}
	if policies, err := w.vault.Sys().ListPolicies(); err != nil || slices.Contains(policies, "reports") {
		t.Errorf("the policies: %q, %v", policies, err)
	}
	if _, err := os.Stat(binary); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the binary is still there: %v", err)
	}
	harness.Eventually(t, "the plugin's process has ended", func() error {
		if got := w.vault.PluginProcesses(t, pluginName); len(got) != 0 {
			return errors.New("it still runs")
		}
		return nil
	})
}

// The commands of docs/faq.md work, and the audit log has the hash that it describes.
func TestFAQCommands(t *testing.T) {
	t.Parallel()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "faq.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(string(doc), -1)
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/reports", role(nil))
	token := w.token("reports")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	hash := ""
	for _, block := range blocks {
		out, err := w.script("cd " + dir + "\n" + block[1])
		if err != nil {
			t.Errorf("%s%v\n%s", block[1], err, out)
		}
		if strings.Contains(block[1], "audit-hash") {
			hash = strings.TrimSpace(out)
		}
	}
	if len(blocks) != 3 || hash == "" {
		t.Fatalf("docs/faq.md has %d commands, want those of minted_after, rotation and the audit", len(blocks))
	}
	audit, err := os.ReadFile(w.vault.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(audit), `"access_token":"`+hash+`"`) {
		t.Errorf("the audit log has no access_token with the hash %q", hash)
	}
	if strings.Contains(string(audit), token) {
		t.Error("the audit log has the token in the clear")
	}
}

// script runs commands of a document as a user with the root token, by the command of the
// product.
func (w *world) script(commands string, env ...string) (output string, err error) {
	w.Helper()
	bin, err := os.MkdirTemp(w.vault.Dir, "bin")
	if err != nil {
		w.Fatal(err)
	}
	if err := os.Symlink(w.vault.Binary, filepath.Join(bin, w.vault.Product.Program())); err != nil {
		w.Fatal(err)
	}
	if w.vault.Product == harness.OpenBao {
		commands = inOpenBao(commands)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", commands)
	cmd.Env = append(append(os.Environ(), w.vault.Environment()...), append(env, "PATH="+bin+":"+os.Getenv("PATH"))...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}
