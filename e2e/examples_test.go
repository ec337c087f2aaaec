// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// exampleTools are the programs that each example's command needs.
var exampleTools = map[string][]string{
	"Shell":   {"sh", "curl", "sed"},
	"Go":      {"go"},
	"Python":  {"python3"},
	"Node.js": {"node"},
	"C#":      {"mcs", "mono"},
}

// The examples do what their README says, started with its commands.
func TestExamples(t *testing.T) {
	t.Parallel()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "examples", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| \\[(.+)\\]\\(.+\\) \\| .* \\| `(.+)` \\|$").FindAllStringSubmatch(string(readme), -1)
	if len(rows) != len(exampleTools) {
		t.Fatalf("examples/README.md has commands for %d examples, want %d: %q", len(rows), len(exampleTools), rows)
	}
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil { // make dev creates it
		t.Fatal(err)
	}

	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/demo", role(nil))
	w.token("demo")
	for i, row := range rows {
		language, command := row[1], row[2]
		t.Run(language, func(t *testing.T) {
			tools := exampleTools[language]
			if tools == nil {
				t.Fatalf("exampleTools does not have %s", language)
			}
			for _, tool := range tools {
				if _, err := exec.LookPath(tool); err != nil {
					harness.Missing(t, "%s is not on PATH; not testing the example in %s", tool, language)
				}
			}
			inner := *w
			inner.TB = t
			(&example{world: &inner, root: root, command: command, role: fmt.Sprintf("demo%d", i)}).check()
		})
	}
}

// example is the example in one language.
type example struct {
	*world
	root    string
	command string
	role    string   // not read by any other example
	secrets []string // must not be in any output, in addition to the tokens
}

// monoAborts is what Mono 6.8 prints when it occasionally aborts while exiting: the
// program has done its work, and the exit code is lost.
const monoAborts = "* Assertion at mono-threads.c:2005"

// lostCode replaces an exit code that was lost.
const lostCode = -1

func (e *example) check() {
	const hello = `200 {"message":"hello ` + clientID + `"}` + "\n"
	api := e.oauth.URL() + oauthserver.DataPath
	file := filepath.Join(e.TempDir(), "token")
	fill := func(content string) {
		e.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			e.Fatal(err)
		}
	}

	// From Vault: one read is enough for three calls.
	reads := e.reads()
	e.succeeds(strings.Repeat(hello, 3), "API_URL="+api, "CALLS=3", "INTERVAL=0")
	e.wantReads("three calls", reads, 1)

	// Mistakes, with Vault's error texts.
	e.fails([]string{"400", `role "nobody" does not exist; write roles/nobody to create it`}, "API_URL="+api, "ROLE=nobody")
	e.secrets = append(e.secrets, "canary-vault-token")
	e.fails([]string{"403", "permission denied"}, "API_URL="+api, "VAULT_TOKEN=canary-vault-token")
	e.fails([]string{"no handler for route"}, "API_URL="+api, "MOUNT=nowhere")
	e.fails([]string{"API_URL"}, "API_URL=")
	nobody := "http://" + harness.FreeAddress(e.TB)
	e.fails([]string{nobody}, "API_URL="+api, "VAULT_ADDR="+nobody)

	// The API refuses a token: the program reads it again, although it is cached, and
	// only once.
	refusing := e.front(api, func(n int64, w http.ResponseWriter, _ *http.Request) bool {
		if n == 2 {
			http.Error(w, "refused", http.StatusUnauthorized)
		}
		return n == 2
	}, nil)
	reads = e.reads()
	e.succeeds(strings.Repeat(hello, 3), "API_URL="+refusing.URL, "CALLS=3", "INTERVAL=0")
	e.wantReads("a call refused once", reads, 2)
	refusing.wantRequests("three calls, one of them refused once", 4)

	stubborn := e.front(api, func(_ int64, w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "refused", http.StatusUnauthorized)
		return true
	}, nil)
	reads = e.reads()
	e.fails([]string{"401", "refused"}, "API_URL="+stubborn.URL, "CALLS=3", "INTERVAL=0")
	e.wantReads("a call always refused", reads, 2)
	stubborn.wantRequests("a call always refused", 2)

	// The API no longer accepts a token: the program gets a newer one.
	var revoked atomic.Pointer[string]
	revoking := e.front(api, func(_ int64, w http.ResponseWriter, r *http.Request) bool {
		authorization := r.Header.Get("Authorization")
		revoked.CompareAndSwap(nil, &authorization)
		if authorization != *revoked.Load() {
			return false
		}
		http.Error(w, "revoked", http.StatusUnauthorized)
		return true
	}, nil)
	e.write("roles/"+e.role, role(nil)) // no other reader has requested a newer one
	reads, mints := e.reads(), len(e.oauth.Requests())
	e.succeeds(strings.Repeat(hello, 3), "API_URL="+revoking.URL, "ROLE="+e.role, "CALLS=3", "INTERVAL=0")
	e.wantReads("a revoked token", reads, 2)
	revoking.wantRequests("three calls, the first with a revoked token", 4)
	if got := len(e.oauth.Requests()) - mints; got != 2 {
		e.Errorf("a revoked token: got %d mints, want 2", got)
	}

	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway} {
		// A Vault that fails once, and then returns a ttl of one second.
		failing := e.front(e.vault.Address(), func(n int64, w http.ResponseWriter, _ *http.Request) bool {
			if n == 1 {
				http.Error(w, `{"errors":["not now"]}`, status)
			}
			return n == 1
		}, func(body []byte) []byte { return regexp.MustCompile(`"ttl":\d+`).ReplaceAll(body, []byte(`"ttl":1`)) })
		e.succeeds(strings.Repeat(hello, 2), "API_URL="+api, "VAULT_ADDR="+failing.URL+"/", "CALLS=2", "INTERVAL=2")
		failing.wantRequests("a failure and two reads", 3)

		broken := e.front(e.vault.Address(), func(_ int64, w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, `{"errors":["not now","try \"later\""]}`, status)
			return true
		}, nil)
		e.fails([]string{strconv.Itoa(status), `not now; try "later"`}, "API_URL="+api, "VAULT_ADDR="+broken.URL)
		broken.wantRequests("a Vault that always fails", 2)
	}

	// The reason for this: Vault restarts a killed plugin on the next request.
	e.vault.SignalPlugin(e.TB, pluginBinary, syscall.SIGKILL)
	e.succeeds(hello, "API_URL="+api)

	// From a file, without Vault.
	noVault := []string{"TOKEN_FILE=" + file, "VAULT_ADDR=", "VAULT_TOKEN=", "CALLS=2", "INTERVAL=0"}
	fill(e.token("demo"))
	e.succeeds(strings.Repeat(hello, 2), append(noVault, "API_URL="+api)...)
	fill(e.token("demo") + "\n")
	e.succeeds(strings.Repeat(hello, 2), append(noVault, "API_URL="+api)...)

	// The agent replaces the file after the program has read it.
	e.secrets = append(e.secrets, "canary-access-token")
	fill("canary-access-token")
	late := e.front(api, func(int64, http.ResponseWriter, *http.Request) bool {
		fill(e.token("demo"))
		return false
	}, nil)
	e.succeeds(strings.Repeat(hello, 2), append(noVault, "API_URL="+late.URL)...)
	late.wantRequests("two calls, the first with an old token", 3)

	fill("canary-access-token")
	counting := e.front(api, nil, nil)
	e.fails([]string{"401", "invalid_token"}, append(noVault, "API_URL="+counting.URL)...)
	counting.wantRequests("a file without a good token", 2)

	// A malformed token is reported without showing it.
	for _, content := range []string{"", "canary-access-token\r\nX-More: 1", "canary-access-token \xff"} {
		fill(content)
		e.fails(nil, append(noVault, "API_URL="+api)...)
	}
	if err := os.Remove(file); err != nil {
		e.Fatal(err)
	}
	e.fails(nil, append(noVault, "API_URL="+api)...)
	e.secrets = append(e.secrets, "canary-malformed")
	e.fails(nil, "API_URL="+api, "VAULT_TOKEN=canary-malformed\nX-More: 1")
}

// run runs the example's command, as a user does in the project's directory.
func (e *example) run(env []string) (stdout, stderr string, code int) {
	e.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", e.command)
	cmd.Dir = e.root
	// An empty variable counts as unset. The last value of a name counts.
	cmd.Env = append(os.Environ(), "MOUNT=", "ROLE=", "CALLS=", "INTERVAL=", "TOKEN_FILE=", "GOFLAGS=-mod=mod", "GOWORK=off",
		"VAULT_ADDR="+e.vault.Address(), "VAULT_TOKEN="+e.vault.Token())
	cmd.Env = append(cmd.Env, env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		e.Fatalf("%s: %v", e.command, err)
	}
	for _, secret := range append(append(e.oauth.Issued(), e.vault.Token(), canary), e.secrets...) {
		if strings.Contains(out.String()+errs.String(), secret) {
			e.Errorf("with %q: the output contains a secret:\n%s%s", env, out.String(), errs.String())
		}
	}
	// If compiling is a command of its own, compile only once.
	if _, run, ok := strings.Cut(e.command, " && "); ok {
		e.command = run
	}
	if stdout, _, ok := strings.Cut(out.String(), monoAborts); ok {
		e.Logf("with %q: Mono aborted after the program's end", env)
		if reports, err := filepath.Glob(filepath.Join(e.root, "mono_crash.*.json")); err == nil {
			for _, report := range reports {
				os.Remove(report) //nolint:errcheck // the report is only in the way
			}
		}
		stderr, _, _ := strings.Cut(errs.String(), "\n===")
		return stdout, stderr, lostCode
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func (e *example) succeeds(want string, env ...string) {
	e.Helper()
	stdout, stderr, code := e.run(env)
	if code != 0 && code != lostCode || stdout != want || stderr != "" {
		e.Errorf("with %q: got exit code %d, output %q and errors %q; want 0, %q and none", env, code, stdout, stderr, want)
	}
}

func (e *example) fails(parts []string, env ...string) {
	e.Helper()
	stdout, stderr, code := e.run(env)
	if code != 1 && code != lostCode || stdout != "" {
		e.Errorf("with %q: got exit code %d and output %q, want 1 and none; errors: %s", env, code, stdout, stderr)
	}
	for _, part := range append(parts, ": ") {
		if !strings.Contains(stderr, part) {
			e.Errorf("with %q: got the errors %q, want them to contain %q", env, stderr, part)
		}
	}
	// A message, not a stack trace. A tool may add a line of its own: curl reports what
	// went wrong, and go run the exit code.
	if lines := strings.Count(stderr, "\n"); lines > 2 {
		e.Errorf("with %q: got %d lines of errors, want a message:\n%s", env, lines, stderr)
	}
}

// reads returns the number of tokens read so far.
func (e *example) reads() (sum int64) {
	e.Helper()
	for _, n := range e.read("status").Data["reads"].(map[string]any) {
		sum += number(e.world, n)
	}
	return sum
}

func (e *example) wantReads(of string, before, want int64) {
	e.Helper()
	if got := e.reads() - before; got != want {
		e.Errorf("%s: got %d reads of Vault, want %d", of, got, want)
	}
}

// front is in front of a server and counts the requests to it.
type front struct {
	*httptest.Server
	t        testing.TB
	requests atomic.Int64
}

// front starts a front. intercept gets the number of each request, and answers it or lets
// it pass; change may change the body of a response that passes.
func (e *example) front(target string, intercept func(n int64, w http.ResponseWriter, r *http.Request) bool, change func(body []byte) []byte) *front {
	e.Helper()
	to, err := url.Parse(target)
	if err != nil {
		e.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }}
	if to.Path != "" {
		proxy.Rewrite = func(r *httputil.ProxyRequest) { r.Out.URL, r.Out.Host = to, to.Host }
	}
	if change != nil {
		proxy.ModifyResponse = func(resp *http.Response) error {
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				return err
			}
			body = change(body)
			resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			resp.Header.Set("Content-Length", strconv.Itoa(len(body)))
			return nil
		}
	}
	f := &front{t: e.TB}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := f.requests.Add(1); intercept == nil || !intercept(n, w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	e.Cleanup(f.Close)
	return f
}

func (f *front) wantRequests(of string, want int64) {
	f.t.Helper()
	if got := f.requests.Load(); got != want {
		f.t.Errorf("%s: got %d requests, want %d", of, got, want)
	}
}
