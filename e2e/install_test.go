// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/zip"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// readmeSections are the sections of the README that take a reader from a release's archive
// to a token.
var readmeSections = []string{"Install it in production", "Configure it", "Read a token"}

// readmeBlocks are the blocks of commands in those sections, in their order.
func readmeBlocks(t *testing.T) (blocks []string) {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, title := range readmeSections {
		_, section, found := strings.Cut(string(readme), "\n## "+title+"\n")
		if !found {
			t.Fatalf("the README has no section %q", title)
		}
		section, _, _ = strings.Cut(section, "\n## ")
		for _, block := range regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$").FindAllStringSubmatch(section, -1) {
			blocks = append(blocks, regexp.MustCompile("(?m)^   ").ReplaceAllString(block[1], ""))
		}
	}
	return blocks
}

// readmeInstallation is the README's script that installs the plugin in a product.
func readmeInstallation(t *testing.T, product harness.Product) (script string) {
	t.Helper()
	for _, tool := range []string{"bash", "curl", "gpg", "gpgv", "unzip", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			harness.Missing(t, "%s is not on PATH: the README's installation is not tested", tool)
		}
	}
	for _, block := range readmeBlocks(t) {
		// TestReadmeBuild runs the other way to get the binary; only GitHub can attest.
		if !strings.Contains(block, "make build") && !strings.Contains(block, "gh attestation verify") {
			script += block
		}
	}
	if product == harness.OpenBao {
		script = inOpenBao(script)
	}
	return script
}

// inOpenBao is a script with bao in place of vault, as the documents advise.
func inOpenBao(script string) string {
	return regexp.MustCompile(`(?m)(^|\| )vault `).ReplaceAllString(script, "${1}bao ")
}

// replaced puts the reader's own names into a text of the README.
func replaced(t *testing.T, text string, own map[string]string) string {
	t.Helper()
	for name, value := range own {
		if !strings.Contains(text, name) {
			t.Errorf("the README no longer has %q", name)
		}
		text = strings.ReplaceAll(text, name, value)
	}
	return text
}

// The README's steps from a release archive to a token work verbatim, except for the
// reader's own names.
func TestReadmeInstallation(t *testing.T) {
	t.Parallel()
	product, _, err := harness.ProductOf(vaultBinary)
	if err != nil {
		t.Fatal(err)
	}
	script := readmeInstallation(t, product)
	dir := t.TempDir()
	plugins := filepath.Join(dir, "plugins")
	if err := os.Mkdir(plugins, 0o700); err != nil {
		t.Fatal(err)
	}
	version := strings.TrimPrefix(pluginVersion, "v")
	platform := runtime.GOOS + "_" + runtime.GOARCH
	fingerprint := publish(t, filepath.Join(dir, "repository"), version, platform)

	reports := demoClient(clientID, canary)
	reports.Audiences, reports.Scopes = []string{"https://api.example.com/"}, []string{"read:reports"}
	oauth := startOAuthFor(t, reports)
	vault := harness.StartVault(t, vaultBinary, plugins)

	own := map[string]string{
		"VERSION=0.1.0": "VERSION=" + version,
		"FINGERPRINT=<fingerprint>             # of the release key":     "FINGERPRINT=" + fingerprint,
		"PLATFORM=linux_amd64                  # of the Vault servers":   "PLATFORM=" + platform,
		"PLUGIN_DIR=/etc/vault.d/plugins       # their plugin_directory": "PLUGIN_DIR=" + plugins,
		"REPOSITORY=https://github.com/mojoauth/$NAME":                   "REPOSITORY=file://" + filepath.Join(dir, "repository"),
		"token_url=https://your-app.mojoauth.com/oauth2/token":           "token_url=" + oauth.TokenURL(),
		"client_id=<client ID>":                                          "client_id=" + clientID,
	}
	text := replaced(t, script, own)

	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(vaultBinary, filepath.Join(dir, product.Program())); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", text)
	cmd.Dir = work
	cmd.Env = append(append(os.Environ(), vault.Environment()...), "PATH="+dir+":"+os.Getenv("PATH"), "GNUPGHOME="+work)
	cmd.Stdin = strings.NewReader(canary + "\n") // the client secret, as typed
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	issued := oauth.Issued()
	if len(issued) == 0 || !strings.HasSuffix(strings.TrimSpace(string(out)), issued[len(issued)-1]) {
		t.Errorf("the output does not end with a token:\n%s", out)
	}
	if strings.Contains(string(out), canary) {
		t.Error("the output contains the client secret")
	}
}

// The README's command builds the version that it names.
func TestReadmeBuild(t *testing.T) {
	t.Parallel()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	var script string
	for _, block := range readmeBlocks(t) {
		if strings.Contains(block, "make build") {
			script += block
		}
	}
	binary := filepath.Join(t.TempDir(), pluginName)
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", script+`"$NAME" -version`)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "NAME="+binary, "VERSION=0.1.0", "PLATFORM="+runtime.GOOS+"_"+runtime.GOARCH)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), pluginName+" v0.1.0 ") {
		t.Errorf("got %v, want it to report version v0.1.0\n%s", err, out)
	}
}

// An archive signed by someone else is not unpacked, even if their key is in the
// repository next to the real one.
func TestReadmeVerification(t *testing.T) {
	t.Parallel()
	script := readmeInstallation(t, harness.HashiCorpVault)
	verification, _, ok := strings.Cut(script, "SHA256=$(")
	if !ok {
		t.Fatal("the README no longer records the binary's checksum")
	}
	version := strings.TrimPrefix(pluginVersion, "v")
	platform := runtime.GOOS + "_" + runtime.GOARCH
	genuine, forged := filepath.Join(t.TempDir(), "genuine"), filepath.Join(t.TempDir(), "forged")
	fingerprint := publish(t, genuine, version, platform)
	publish(t, forged, version, platform)
	key := func(repository string) string {
		return filepath.Join(repository, "raw", "v"+version, "release-key.asc")
	}
	both := ""
	for _, repository := range []string{genuine, forged} {
		content, err := os.ReadFile(key(repository))
		if err != nil {
			t.Fatal(err)
		}
		both += string(content)
	}
	if err := os.WriteFile(key(forged), []byte(both), 0o600); err != nil {
		t.Fatal(err)
	}
	for repository, unpacked := range map[string]bool{genuine: true, forged: false} {
		work := t.TempDir()
		cmd := exec.CommandContext(t.Context(), "bash", "-uo", "pipefail", "-c", replaced(t, verification, map[string]string{
			"VERSION=0.1.0": "VERSION=" + version,
			"FINGERPRINT=<fingerprint>             # of the release key":   "FINGERPRINT=" + fingerprint,
			"PLATFORM=linux_amd64                  # of the Vault servers": "PLATFORM=" + platform,
			"REPOSITORY=https://github.com/mojoauth/$NAME":                 "REPOSITORY=file://" + repository,
		}))
		cmd.Dir = work
		cmd.Env = append(os.Environ(), "GNUPGHOME="+work)
		out, err := cmd.CombinedOutput()
		if _, missing := os.Stat(filepath.Join(work, pluginName)); (missing == nil) != unpacked || (err == nil) != unpacked {
			t.Errorf("%s: got unpacked %v (%v), want %v\n%s", filepath.Base(repository), missing == nil, err, unpacked, out)
		}
	}
}

// publish creates a release like goreleaser's, with the plugin under test and signed with
// a new key, in a directory laid out like the repository's page. It returns the key's
// fingerprint.
func publish(t *testing.T, repository, version, platform string) (fingerprint string) {
	t.Helper()
	release := filepath.Join(repository, "releases", "download", "v"+version)
	raw := filepath.Join(repository, "raw", "v"+version)
	keys := t.TempDir()
	for _, dir := range []string{release, raw} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	archive := pluginName + "_" + version + "_" + platform + ".zip"
	file, err := os.Create(filepath.Join(release, archive))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	writer := zip.NewWriter(file)
	for name, data := range map[string][]byte{pluginName: content, "LICENSE.txt": []byte("licence")} {
		entry, err := writer.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := entry.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	zipped, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	sums := filepath.Join(release, pluginName+"_"+version+"_SHA256SUMS")
	text := fmt.Sprintf("%x  %s\n%x  %s\n", sha256.Sum256(zipped), archive, sha256.Sum256([]byte("other")), pluginName+"_"+version+"_plan9_mips.zip")
	if err := os.WriteFile(sums, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	gpg := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("gpg", append([]string{"--batch", "--quiet", "--homedir", keys, "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("gpg %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	gpg("--quick-gen-key", "Test <test@example.org>", "ed25519", "sign", "1d")
	gpg("--armor", "--export", "--output", filepath.Join(raw, "release-key.asc"))
	gpg("--detach-sign", "--output", sums+".sig", sums)
	match := regexp.MustCompile(`(?m)^fpr:::::::::([0-9A-F]{40}):`).FindStringSubmatch(gpg("--with-colons", "--list-keys"))
	if match == nil {
		t.Fatal("gpg reported no fingerprint")
	}
	// Otherwise the agent that gpg started outlives the test.
	if out, err := exec.Command("gpgconf", "--homedir", keys, "--kill", "all").CombinedOutput(); err != nil {
		t.Errorf("gpgconf: %v\n%s", err, out)
	}
	return match[1]
}
