// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// `make dev` is the first thing a newcomer runs: it has to end in a token that
// opens the API, and to leave nothing behind.
func TestDevScript(t *testing.T) {
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	var out lockedBuffer
	cmd := exec.Command(filepath.Join(root, "scripts", "dev.sh"))
	cmd.Env = append(os.Environ(), "VAULT_BIN="+vaultBinary, "MOJOAUTH_TOKEN_URL=", "AGENT=1")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it has ended if all went well

	harness.Eventually(t, "dev.sh is up", func() error {
		select {
		case err := <-exited:
			t.Fatalf("it has ended: %v\n%s", err, out.String())
		default:
		}
		if !strings.Contains(out.String(), "Press Ctrl-C") {
			return errors.New(out.String())
		}
		return nil
	})
	for _, want := range []string{"access_token ", `200 {"message":"hello demo-client"}`, "200 with what the agent wrote", "supervised.log"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it did not print %q:\n%s", want, out.String())
		}
	}
	address := regexp.MustCompile(`VAULT_ADDR=(\S+)`).FindStringSubmatch(out.String())
	if address == nil {
		t.Fatalf("it did not print VAULT_ADDR:\n%s", out.String())
	}

	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("after an interrupt: %v\n%s", err, out.String())
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it did not end after an interrupt")
	}
	if resp, err := http.Get(address[1]); err == nil {
		resp.Body.Close()
		t.Error("Vault still runs")
	}
}

// lockedBuffer is a buffer that a process writes while a test reads.
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
