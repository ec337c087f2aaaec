// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// printedCommands maps the beginning of each command that `make dev` prints to what its
// output must contain; $PROGRAM is the server's command.
var printedCommands = []struct{ begins, answers string }{
	{"export ", ""},
	{"$PROGRAM read mojoauth/creds/demo", "access_token "},
	{"$PROGRAM read -field=access_token mojoauth/creds/demo-narrow", "eyJ"},
	{"$PROGRAM write -force mojoauth/rotate-role/demo", "last_vault_rotation "},
	{"$PROGRAM read mojoauth/config", "client_id "},
	{"$PROGRAM read -format=json mojoauth/status", `"cached_tokens"`},
	{`curl -H "X-Vault-Token: $VAULT_TOKEN" $VAULT_ADDR/v1/mojoauth/metrics`, "mojoauth_cached_tokens "},
	{"$PROGRAM path-help mojoauth/roles/demo", "audience"},
	{"tail ", "core: "},
	{`curl -H "Authorization: Bearer $($PROGRAM read -field=access_token mojoauth/creds/demo)" $API_URL`, `{"message":"hello demo-client"}`},
	{"curl -X PUT ", "503"},
	{"curl -X DELETE ", ""},
}

// `make dev` is the first thing a newcomer runs. It must get a token that the API
// accepts, print commands that work in another terminal, and leave nothing behind.
func TestDevScript(t *testing.T) {
	t.Parallel()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	product, version, err := harness.ProductOf(vaultBinary)
	if err != nil {
		t.Fatal(err)
	}
	variable := strings.ToUpper(product.Program()) + "_BIN"
	var out lockedBuffer
	cmd := exec.Command(filepath.Join(root, "scripts", "dev.sh"))
	cmd.Env = append(os.Environ(), "SERVER="+product.Choice(), variable+"="+vaultBinary, "MOJOAUTH_TOKEN_URL=", "AGENT=1")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it has exited if all went well

	// It compiles, in parallel with other tests.
	harness.EventuallyWithin(t, 5*time.Minute, "dev.sh is up", func() error {
		select {
		case err := <-exited:
			t.Fatalf("dev.sh exited: %v\n%s", err, out.String())
		default:
		}
		if !strings.Contains(out.String(), "Press Ctrl-C") {
			return errors.New(out.String())
		}
		return nil
	})
	for _, want := range []string{
		fmt.Sprintf("==> Running %s %s, named by %s; for ", product, version, variable),
		"access_token ", `200 {"message":"hello demo-client"}`, "200 with the header that the agent wrote", "supervised.log",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("dev.sh did not print %q:\n%s", want, out.String())
		}
	}
	address := regexp.MustCompile(`VAULT_ADDR=(\S+)`).FindStringSubmatch(out.String())
	if address == nil {
		t.Fatalf("dev.sh did not print VAULT_ADDR:\n%s", out.String())
	}
	tryPrintedCommands(t, product, out.String())
	checkReadmeSample(t, root, out.String())

	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("after an interrupt: %v\n%s", err, out.String())
		}
	case <-time.After(30 * time.Second):
		t.Fatal("dev.sh did not exit after an interrupt")
	}
	if resp, err := http.Get(address[1]); err == nil {
		resp.Body.Close()
		t.Errorf("%s is still running", product)
	}
}

// checkReadmeSample compares what the README shows of a read with what dev.sh printed: the
// same keys, in the same order, with values of the same form.
func checkReadmeSample(t *testing.T, root, printed string) {
	t.Helper()
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, sample, found := strings.Cut(string(readme), "```text\n$ vault read mojoauth/creds/demo\n")
	sample, _, closed := strings.Cut(sample, "```\n")
	if !found || !closed {
		t.Fatal("the README shows no read of mojoauth/creds/demo")
	}
	_, real, found := strings.Cut(printed, " read mojoauth/creds/demo\n")
	real, _, ended := strings.Cut(real, "==> ")
	if !found || !ended {
		t.Fatalf("it printed no read of mojoauth/creds/demo:\n%s", printed)
	}
	form := func(table string) (rows []string) {
		for line := range strings.Lines(table) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			value = strings.TrimSpace(value)
			switch key {
			case "access_token":
				value, _, _ = strings.Cut(value, ".") // the header of the JWT
			case "ttl", "rotation_period":
				value = regexp.MustCompile(`^([0-9]+m)?[0-9]+[ms]$`).ReplaceAllString(value, "<duration>")
			default:
				value = regexp.MustCompile(`[0-9]`).ReplaceAllString(value, "0")
			}
			rows = append(rows, key+" "+value)
		}
		return rows
	}
	if got, want := form(sample), form(real); !slices.Equal(got, want) {
		t.Errorf("the README shows\n%s\nand make dev prints\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// tryPrintedCommands runs every command that dev.sh printed, in order, as in a newly
// opened terminal.
func tryPrintedCommands(t *testing.T, product harness.Product, printed string) {
	t.Helper()
	_, printed, _ = strings.Cut(printed, "In another terminal:\n")
	commands := regexp.MustCompile(`(?m)^  (\S.*)$`).FindAllStringSubmatch(printed, -1)
	tried := make(map[string]bool)
	var exports strings.Builder
	outage := false
	for _, match := range commands {
		command := match[1]
		var begins, answers string
		for _, known := range printedCommands {
			if begin := strings.ReplaceAll(known.begins, "$PROGRAM", product.Program()); strings.HasPrefix(command, begin) && len(begin) > len(begins) {
				begins, answers = begin, known.answers
			}
		}
		if begins == "" {
			t.Errorf("dev.sh printed %q, which is not in printedCommands", command)
			continue
		}
		tried[begins] = true
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-c", exports.String()+command)
		cmd.Dir = t.TempDir()
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + cmd.Dir}
		answer, err := cmd.CombinedOutput()
		refused := outage && strings.Contains(command, "rotate-role")
		if refused {
			answers = "The next attempt is at"
		}
		if (err != nil) != refused || !strings.Contains(string(answer), answers) {
			t.Errorf("%s: got %v, %s; want output with %q, and failure: %v", command, err, answer, answers, refused)
		}
		if strings.Contains(string(answer), "client_secret ") {
			t.Errorf("%s: the output contains the client secret:\n%s", command, answer)
		}
		if strings.HasPrefix(command, "export ") {
			exports.WriteString(command + "\n")
		}
		outage = outage && !strings.HasPrefix(command, "curl -X DELETE ") || strings.HasPrefix(command, "curl -X PUT ")
	}
	if len(tried) != len(printedCommands) {
		t.Errorf("dev.sh printed %d of the %d commands in printedCommands: %v", len(tried), len(printedCommands), tried)
	}
}

// lockedBuffer is a buffer that a process writes while a test reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
