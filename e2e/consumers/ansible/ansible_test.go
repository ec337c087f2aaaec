// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package ansible tests playbooks that read tokens with the community.hashi_vault
// collection.
package ansible

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

const hosts = 6 // on which Ansible runs in parallel

func TestMain(m *testing.M) { os.Exit(scene.Main(m)) }

// controller runs Ansible with an inventory whose hosts are all the local machine.
type controller struct {
	*scene.Scene
	bin       string
	dir       string
	inventory string
	token     string
}

func newController(s *scene.Scene) *controller {
	s.Helper()
	c := &controller{Scene: s, bin: scene.Program(s, "ansible"), dir: s.TempDir()}
	c.inventory = filepath.Join(c.dir, "inventory")
	// The interpreter applies to delegated tasks on localhost too. The module needs hvac,
	// which is installed in Ansible's virtual environment.
	lines := "[fleet]\n"
	for n := range hosts {
		lines += fmt.Sprintf("host%02d\n", n)
	}
	lines += "[all:vars]\nansible_connection=local\nansible_python_interpreter=" + filepath.Join(c.bin, "python") + "\n"
	if err := os.WriteFile(c.inventory, []byte(lines), 0o600); err != nil {
		s.Fatal(err)
	}
	c.token = s.Token("ansible", `path "mojoauth/creds/*" { capabilities = ["read"] }`)
	return c
}

// play runs a playbook on all hosts in parallel and returns its output.
func (c *controller) play(playbook string, variables map[string]string, flags ...string) (string, error) {
	c.Helper()
	args := append([]string{"-i", c.inventory, "-f", fmt.Sprint(hosts)}, flags...)
	for name, value := range variables {
		args = append(args, "-e", name+"="+value)
	}
	cmd := exec.CommandContext(c.Context(), filepath.Join(c.bin, "ansible-playbook"), append(args, playbook)...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(),
		"VAULT_ADDR="+c.Vault.Address(), "VAULT_TOKEN="+c.token,
		"ANSIBLE_HOME="+c.dir, "ANSIBLE_NOCOLOR=1", "ANSIBLE_LOCALHOST_WARNING=False",
	)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// hides verifies that out contains no issued token, no Vault token, and no client secret.
func (c *controller) hides(what, out string) {
	c.Helper()
	for _, token := range append(c.OAuth.Issued(), scene.ClientSecret, c.token) {
		if strings.Contains(out, token) {
			c.Errorf("%s: Ansible printed a token or the client secret", what)
		}
	}
}

func example(t testing.TB) string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "examples", "ansible", "call-api.yaml")
}

func testdata(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// withoutNoLog writes a copy of a playbook with no_log disabled and returns the copy's path.
func (c *controller) withoutNoLog(playbook string) string {
	c.Helper()
	content, err := os.ReadFile(playbook)
	if err != nil {
		c.Fatal(err)
	}
	open := strings.ReplaceAll(string(content), "no_log: true", "no_log: false")
	if open == string(content) {
		c.Fatalf("%s does not set no_log", playbook)
	}
	path := filepath.Join(c.dir, "open-"+filepath.Base(playbook))
	if err := os.WriteFile(path, []byte(open), 0o600); err != nil {
		c.Fatal(err)
	}
	return path
}

// The API accepts every host's call, the engine mints one token for all hosts, and the output
// of -vvv does not show the token.
func TestEveryHostCallsTheAPI(t *testing.T) {
	s := scene.New(t, time.Hour, nil)
	s.Role("both", map[string]any{"scopes": "read:data write:data"})
	c := newController(s)
	api := s.API()
	seenReads, seenMints := map[string]int{}, 0
	for _, test := range []struct {
		name, playbook, path string
		reads, mints         int
	}{
		{"lookup", example(t), "mojoauth/creds/reports", hosts, 1},
		{"module", testdata(t, "module.yaml"), "mojoauth/creds/reports", 1, 0},
		{"lookup of a scope subset", example(t), "mojoauth/creds/both?scopes=read:data", hosts, 1},
		{"module with a scope subset", testdata(t, "module.yaml"), "mojoauth/creds/both?scopes=read:data", 1, 0},
	} {
		began := time.Now()
		out, err := c.play(test.playbook, map[string]string{"api_url": api.URL, "mojoauth_path": test.path}, "-vvv")
		if err != nil {
			t.Fatalf("%s: %v\n%s", test.name, err, out)
		}
		took := time.Since(began)
		if statuses := api.Statuses(); !maps.Equal(statuses, map[int]int{200: hosts}) {
			t.Errorf("%s: the API returned %v, want %d times 200", test.name, statuses, hosts)
		}
		c.hides(test.name, out)
		reads, mints := s.Reads()
		total := 0
		for outcome, n := range reads {
			total += n - seenReads[outcome]
		}
		if reads["error"] != 0 || total != test.reads || mints-seenMints != test.mints {
			t.Errorf("%s: got %d reads and %d mints, want %d and %d: %v", test.name, total, mints-seenMints, test.reads, test.mints, reads)
		}
		seenReads, seenMints = reads, mints
		t.Logf("%s: %d hosts, %d reads, %d mints, in %s", test.name, hosts, total, test.mints, took.Round(time.Second/10))
	}

	// Without no_log, the output shows the token. This also proves that hides finds tokens.
	out, err := c.play(c.withoutNoLog(example(t)), map[string]string{"api_url": api.URL, "mojoauth_path": "mojoauth/creds/reports"}, "-vvv", "-l", "host00")
	if err != nil {
		t.Fatalf("without no_log: %v\n%s", err, out)
	}
	if !slices.ContainsFunc(s.OAuth.Issued(), func(token string) bool { return strings.Contains(out, token) }) {
		t.Errorf("without no_log, -vvv did not print the token:\n%s", out)
	}
}

// A failed read ends the playbook with the engine's error, which no_log does not hide.
func TestOutputShowsEngineErrors(t *testing.T) {
	s := scene.New(t, time.Hour, nil)
	c := newController(s)
	api := s.API()
	for name, playbook := range map[string]string{"lookup": example(t), "module": testdata(t, "module.yaml")} {
		out, err := c.play(playbook, map[string]string{"api_url": api.URL, "mojoauth_path": "mojoauth/creds/nosuch"}, "-l", "host00")
		if err == nil {
			t.Errorf("%s: a role that does not exist did not fail the playbook", name)
		}
		if !strings.Contains(out, `role "nosuch" does not exist`) {
			t.Errorf("%s: Ansible did not show the engine's error:\n%s", name, out)
		}
		c.hides(name, out)
	}
	if statuses := api.Statuses(); len(statuses) != 0 {
		t.Errorf("got calls of the API with the statuses %v, want none", statuses)
	}
}
