// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// hardening returns the code blocks in the given language below "### title" in
// SECURITY.md.
func hardening(t *testing.T, title, language string) []string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "SECURITY.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "\n### "+title+"\n")
	section, _, _ = strings.Cut(section, "\n### ")
	var blocks []string
	for _, block := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(section, -1) {
		blocks = append(blocks, block[1])
	}
	if len(blocks) == 0 {
		t.Fatalf("SECURITY.md has no %s below %q", language, title)
	}
	return blocks
}

// runHardening runs commands from SECURITY.md with the root token.
func (w *world) runHardening(commands string, env ...string) {
	w.Helper()
	bin, err := os.MkdirTemp(w.vault.Dir, "bin")
	if err != nil {
		w.Fatal(err)
	}
	if err := os.Symlink(w.vault.Binary, filepath.Join(bin, "vault")); err != nil {
		w.Fatal(err)
	}
	cmd := exec.Command("sh", "-eu", "-c", commands)
	cmd.Env = append(append(os.Environ(), w.vault.Environment()...), append(env, "PATH="+bin+":"+os.Getenv("PATH"))...)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Fatalf("%v\n%s", err, out)
	}
}

// The policies in SECURITY.md allow what the text says, and nothing more.
func TestHardeningPolicies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, name := range []string{"config", "config/partner"} {
		w.write(name, w.config(nil))
	}
	w.write("roles/reports", role(nil))
	policies := hardening(t, "Policies", "hcl")
	names := []string{"rotates the secret", "writes all but default", "sends the secret", "reads whole scopes"}
	if len(policies) != len(names) {
		t.Fatalf("SECURITY.md has %d policies, want those for a client that %s", len(policies), strings.Join(names, ", "))
	}
	type attempt struct {
		method, path, body string
		status             int
	}
	const (
		secret     = `{"client_secret": "` + canary + `"}`
		unverified = `{"client_secret": "` + canary + `", "verify_connection": false}`
		moved      = `{"client_secret": "` + canary + `", "token_url": "https://evil.test/"}`
		trusted    = `{"client_secret": "` + canary + `", "ca_cert": ""}`
		null       = `{"client_secret": null}`
		bare       = `{"request_timeout": 9}`
	)
	for i, attempts := range [][]attempt{
		{
			{"PUT", "config", secret, 204},
			{"PUT", "config/default", secret, 204},
			{"PUT", "config", unverified, 403},
			{"PUT", "config", moved, 403},
			{"PUT", "config/default", moved, 403},
			{"PUT", "config", trusted, 403},
			{"PUT", "config", bare, 403},
			{"PUT", "config", null, 400},
			{"PUT", "config/partner", secret, 403},
			{"PUT", "config/DEFAULT", secret, 403},
			{"GET", "config", "", 403},
			{"DELETE", "config/default", "", 403},
		},
		{
			{"PUT", "config/partner", bare, 204},
			{"GET", "config/partner", "", 200},
			{"PUT", "config", bare, 403},
			{"PUT", "config/default", bare, 403},
			{"GET", "config", "", 403},
			{"GET", "config/default", "", 403},
			{"DELETE", "config", "", 403},
			{"DELETE", "config/default", "", 403},
			{"PUT", "config/Default", bare, 400},
			{"GET", "config/DEFAULT", "", 400},
		},
		{
			{"PUT", "config/partner", secret, 204},
			{"PUT", "config/partner", bare, 403},
			{"PUT", "config/partner", null, 400},
			{"PUT", "config/partner", `{"client_secret": "", "client_id": "x"}`, 400},
			{"PUT", "config", secret, 403},
		},
		{
			{"GET", "creds/reports", "", 200},
			{"GET", "creds/reports?scopes=read:data", "", 403},
			{"GET", "creds/reports?min_ttl=1h", "", 403},
			{"GET", "creds/Reports", "", 403},
			{"PUT", "rotate-role/reports", "", 403},
		},
	} {
		name := strings.ReplaceAll(names[i], " ", "-")
		w.policy(name, policies[i])
		client := w.as(&api.TokenCreateRequest{Policies: []string{name}})
		for _, a := range attempts {
			path, query, _ := strings.Cut(a.path, "?")
			req := client.NewRequest(a.method, "/v1/mojoauth/"+path)
			if key, value, ok := strings.Cut(query, "="); ok {
				req.Params.Set(key, value)
			}
			if a.body != "" {
				req.BodyBytes = []byte(a.body)
			}
			resp, err := client.RawRequest(req) //nolint:staticcheck // there is no other way to send a path and a body verbatim
			var status int
			var refused *api.ResponseError
			switch {
			case errors.As(err, &refused):
				status = refused.StatusCode
			case err != nil:
				t.Fatal(err)
			default:
				status = resp.StatusCode
				_ = resp.Body.Close()
			}
			if status != a.status {
				t.Errorf("a client that %s: %s %s %s: got %d, want %d (%v)", names[i], a.method, a.path, a.body, status, a.status, err)
			}
		}
	}
	w.noCanary()
}

// The rate limits in SECURITY.md work.
func TestHardeningRateLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.runHardening(strings.Join(hardening(t, "Rate limits", "sh"), "\n"))
	for path, rate := range map[string]int{"mojoauth/rotate-role/app": 1, "mojoauth/config": 5, "mojoauth/config/default": 5} {
		// A burst may be as large as the rate, and a new second may begin between two
		// requests.
		var status int
		for range 10 * (rate + 1) {
			_, err := w.vault.Logical().Write(path, map[string]any{"verify_connection": false})
			var refused *api.ResponseError
			if errors.As(err, &refused) {
				status = refused.StatusCode
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if status != http.StatusTooManyRequests {
			t.Errorf("%s has no limit: got status %d", path, status)
		}
	}
	w.token("app")
}

// The listener in SECURITY.md belongs to one user, and refuses forged requests.
func TestHardeningListener(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/reports", role(nil))
	// A socket's path must be short.
	dir, err := os.MkdirTemp("", "listener")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "vault.sock")
	listener := hardening(t, "Listeners", "hcl")[0]
	for own, value := range map[string]string{
		`"/run/reports/vault.sock"`:          strconv.Quote(socket),
		`socket_user            = "reports"`: fmt.Sprintf(`socket_user = "%d"`, os.Getuid()),
		`socket_group           = "reports"`: fmt.Sprintf(`socket_group = "%d"`, os.Getgid()),
	} {
		if !strings.Contains(listener, own) {
			t.Fatalf("SECURITY.md no longer has %s", own)
		}
		listener = strings.Replace(listener, own, value, 1)
	}
	agent := w.vault.StartAgent(t, "listener", `path "mojoauth/creds/reports" { capabilities = ["read"] }`,
		"api_proxy { use_auto_auth_token = true } # in %s\n"+listener)
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	get := func(header string) (status int, token string, err error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent/v1/mojoauth/creds/reports", nil)
		if err != nil {
			return 0, "", err
		}
		if header != "" {
			req.Header.Set(header, "true")
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		var answer struct {
			Data struct {
				AccessToken string `json:"access_token"`
			}
		}
		if resp.StatusCode == http.StatusOK {
			err = json.NewDecoder(resp.Body).Decode(&answer)
		}
		return resp.StatusCode, answer.Data.AccessToken, err
	}
	harness.Eventually(t, "the agent returns a token", func() error {
		status, token, err := get("X-Vault-Request")
		if err != nil || status != http.StatusOK || token == "" {
			return fmt.Errorf("got status %d, %w: %s", status, err, agent.Log())
		}
		return nil
	})
	if status, token, err := get(""); err != nil || status == http.StatusOK || token != "" {
		t.Errorf("without the header: got status %d, %v; want an error", status, err)
	}
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("the socket has mode %o, want 600", got)
	}
}

// A plugin registered under another name runs in a process of its own.
func TestHardeningProcess(t *testing.T) {
	t.Parallel()
	plugins := t.TempDir()
	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(plugins, pluginName), content, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	w := &world{TB: t, oauth: startOAuth(t), vault: harness.StartVault(t, vaultBinary, plugins)}
	w.vault.Register(t, plugins, pluginName, pluginName, pluginVersion)
	for _, mount := range []string{"mojoauth", "second"} {
		w.vault.Enable(t, mount, pluginName, pluginVersion)
	}
	processes := func(want int) {
		t.Helper()
		if got := w.vault.PluginProcesses(t, pluginName); len(got) != want {
			t.Errorf("got the processes %v, want %d", got, want)
		}
	}
	w.read("status")
	processes(1)
	w.runHardening(hardening(t, "A process of its own", "sh")[0],
		"SHA256="+sha256Of(t, filepath.Join(plugins, pluginName)), "VERSION="+strings.TrimPrefix(pluginVersion, "v"))
	if _, err := w.vault.Logical().Read("payments/status"); err != nil {
		t.Error(err)
	}
	processes(2)
}
