// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package terraform tests the configurations in docs/consumers.md with Terraform or OpenTofu
// and the Vault provider.
//
// The tests do not download the provider: TERRAFORM_PROVIDER_VAULT names its binary. They
// are skipped if the variable is not set, or if neither terraform nor tofu is on PATH.
package terraform

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

func TestMain(m *testing.M) { os.Exit(scene.Main(m)) }

// workspace is a directory with a configuration and its state.
type workspace struct {
	*scene.Scene
	program string
	dir     string
	output  strings.Builder // everything that Terraform printed
}

func newWorkspace(s *scene.Scene) *workspace {
	s.Helper()
	provider := os.Getenv("TERRAFORM_PROVIDER_VAULT")
	if provider == "" {
		harness.Skip(s, "TERRAFORM_PROVIDER_VAULT is not set to the path of terraform-provider-vault")
	}
	w := &workspace{Scene: s, dir: s.TempDir()}
	for _, name := range []string{"terraform", "tofu"} {
		if path, err := exec.LookPath(name); err == nil {
			w.program = path
			break
		}
	}
	if w.program == "" {
		harness.Skip(s, "neither terraform nor tofu is on PATH")
	}
	w.file("cli.tfrc", fmt.Sprintf("provider_installation {\n  dev_overrides {\n    \"hashicorp/vault\" = %q\n  }\n  direct {}\n}\n", filepath.Dir(provider)))
	w.file("provider.tf", `terraform {
  required_providers {
    vault = {
      source = "hashicorp/vault"
    }
  }
}

provider "vault" {
  skip_child_token = true
}
`)
	return w
}

func (w *workspace) file(name, content string) {
	w.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(content), 0o600); err != nil {
		w.Fatal(err)
	}
}

// run runs Terraform and returns its output and exit code.
func (w *workspace) run(args ...string) (string, int) {
	w.Helper()
	cmd := exec.CommandContext(w.Context(), w.program, args...)
	cmd.Dir = w.dir
	cmd.Env = append(os.Environ(),
		"TF_CLI_CONFIG_FILE="+filepath.Join(w.dir, "cli.tfrc"), "TF_IN_AUTOMATION=1", "CHECKPOINT_DISABLE=1",
		"VAULT_ADDR="+w.Vault.Address(), "VAULT_TOKEN="+w.Vault.Token(),
		"TF_VAR_mojoauth_client_secret="+scene.ClientSecret,
	)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		w.Fatalf("%s: %v", w.program, err)
	}
	w.output.Write(out)
	return string(out), cmd.ProcessState.ExitCode()
}

func (w *workspace) must(args ...string) string {
	w.Helper()
	out, code := w.run(args...)
	if code != 0 {
		w.Fatalf("%s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// contains reports whether a file in the workspace, such as the state, contains text.
func (w *workspace) contains(name, text string) bool {
	w.Helper()
	content, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		w.Fatal(err)
	}
	return strings.Contains(string(content), text)
}

// documented returns the HCL blocks under a heading of docs/consumers.md, with the values of
// this scene.
func (w *workspace) documented(heading string) string {
	w.Helper()
	root, err := harness.Root()
	if err != nil {
		w.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "consumers.md"))
	if err != nil {
		w.Fatal(err)
	}
	_, section, ok := strings.Cut(string(doc), "\n"+heading+"\n")
	if !ok {
		w.Fatalf("docs/consumers.md has no heading %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n##")
	var blocks string
	for _, block := range strings.Split(section, "```hcl\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		blocks += block + "\n"
	}
	return strings.NewReplacer(
		"https://your-app.mojoauth.com/oauth2/token", w.OAuth.TokenURL(), "example-client-id", scene.ClientID,
		"https://api.example.com/", oauthserver.DataAudience, "read:reports", oauthserver.DataScope,
	).Replace(blocks)
}

// hides verifies that text is not in the state, in the plan, or in Terraform's output.
func (w *workspace) hides(what, text, plan string) {
	w.Helper()
	if w.contains("terraform.tfstate", text) {
		w.Errorf("the state contains %s", what)
	}
	if strings.Contains(plan, text) {
		w.Errorf("the plan contains %s", what)
	}
	if strings.Contains(w.output.String(), text) {
		w.Errorf("Terraform printed %s", what)
	}
}

// planned saves a plan and returns it as JSON.
func (w *workspace) planned() string {
	w.Helper()
	w.must("plan", "-no-color", "-out", "saved.plan")
	printed := w.output.String()
	plan := w.must("show", "-json", "saved.plan")
	w.output.Reset()
	w.output.WriteString(printed)
	return plan
}

// role returns the documented role without the config that it depends on.
func (w *workspace) role() string {
	w.Helper()
	_, role, ok := strings.Cut(w.documented("### Config and role"), "resource \"vault_generic_endpoint\" \"role\"")
	if !ok {
		w.Fatal("docs/consumers.md has no role")
	}
	lines := strings.Split("resource \"vault_generic_endpoint\" \"role\""+role, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(line string) bool { return strings.Contains(line, "depends_on") }), "\n")
}

// Terraform applies the documented config and role: the state contains the client secret,
// and a second plan is empty. A token that the plan and the apply read is accepted by the
// API and is not stored.
func TestConfigRoleAndToken(t *testing.T) {
	s := scene.New(t, time.Hour, nil)
	w := newWorkspace(s)
	t.Log(w.must("version"))
	if _, err := s.Vault.Logical().Delete("mojoauth/roles/reports"); err != nil {
		t.Fatal(err)
	}

	w.file("main.tf", w.documented("### Config and role"))
	w.must("apply", "-auto-approve", "-no-color")
	if !w.contains("terraform.tfstate", scene.ClientSecret) {
		t.Error("the state does not contain the client secret, but docs/consumers.md says that it does")
	}
	if out, code := w.run("plan", "-detailed-exitcode", "-no-color"); code != 0 {
		t.Errorf("a second plan is not empty: exit code %d\n%s", code, out)
	}

	w.file("token.tf", w.documented("### A token")+fmt.Sprintf(`
resource "terraform_data" "call" {
  provisioner "local-exec" {
    command     = "curl -fsS -o /dev/null -H \"Authorization: Bearer $TOKEN\" %s"
    environment = { TOKEN = ephemeral.vault_generic_secret.reports.data["access_token"] }
  }
}
`, s.OAuth.URL()+oauthserver.DataPath))
	plan := w.planned()
	w.must("apply", "-no-color", "saved.plan")
	reads, mints := s.Reads()
	if reads["minted"] != 1 || reads["hit"] != 1 || mints != 1 {
		t.Errorf("after a plan and an apply, status reports the reads %v and %d mints, want two reads and one mint", reads, mints)
	}
	for _, token := range s.OAuth.Issued() {
		w.hides("a token", token, plan)
	}
	if strings.Contains(w.output.String(), scene.ClientSecret) {
		t.Error("Terraform printed the client secret")
	}
}

// An ephemeral resource writes the config without storing the client secret.
func TestConfigOutsideTheState(t *testing.T) {
	s := scene.New(t, time.Hour, nil)
	w := newWorkspace(s)
	for _, path := range []string{"roles/reports", "config/default"} {
		if _, err := s.Vault.Logical().Delete("mojoauth/" + path); err != nil {
			t.Fatal(err)
		}
	}
	before := len(s.OAuth.Requests())
	w.file("main.tf", w.documented("### A config outside the state")+w.role())
	plan := w.planned()
	planned := len(s.OAuth.Requests())
	w.must("apply", "-no-color", "saved.plan")
	t.Logf("token requests: %d to plan, %d to apply", planned-before, len(s.OAuth.Requests())-planned)
	w.hides("the client secret", scene.ClientSecret, plan)
	secret, err := s.Vault.Logical().Read("mojoauth/creds/reports")
	if err != nil {
		t.Fatal(err)
	}
	if status, err := s.CallAPI(secret.Data["access_token"].(string)); err != nil || status != 200 {
		t.Errorf("the API returned %d, %v, want 200", status, err)
	}
}
