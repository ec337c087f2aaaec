// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package harness runs the real programs for the end-to-end tests: the plugin binary, and
// Vault or OpenBao. Everything listens on free loopback ports, and stops with the test
// that started it.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Root returns the project's directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "scripts", "vault.sh")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("not inside the project's directory")
		}
		dir = parent
	}
}

// BuildPlugin builds the plugin with the given version into dir, and returns the binary's
// name in dir.
func BuildPlugin(dir, version string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	return buildPlugin(root, dir, version)
}

// ErrNoHistory means that the commit is missing, as in a shallow clone.
var ErrNoHistory = errors.New("git does not have that commit")

// BuildPluginOf is BuildPlugin for the project at a commit.
func BuildPluginOf(t testing.TB, commit, dir, version string) (string, error) {
	t.Helper()
	root, err := Root()
	if err != nil {
		return "", err
	}
	archive := exec.Command("git", "-C", root, "archive", commit)
	tar := exec.Command("tar", "-x", "-C", t.TempDir())
	if tar.Stdin, err = archive.StdoutPipe(); err != nil {
		return "", err
	}
	if err := tar.Start(); err != nil {
		return "", err
	}
	if err := archive.Run(); err != nil {
		_ = tar.Wait()
		return "", fmt.Errorf("%w: %s: %w", ErrNoHistory, commit, err)
	}
	if err := tar.Wait(); err != nil {
		return "", err
	}
	return buildPlugin(tar.Args[len(tar.Args)-1], dir, version)
}

func buildPlugin(source, dir, version string) (string, error) {
	const module = "github.com/mojoauth/vault-plugin-secrets-mojoauth"
	name := "vault-plugin-secrets-mojoauth-" + version
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X "+module+".Version="+version+" -X "+module+".Commit=e2e",
		"-o", filepath.Join(dir, name), "./cmd/vault-plugin-secrets-mojoauth")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the plugin: %w\n%s", err, out)
	}
	return name, nil
}

// BuildTool builds a command of this module into dir, under its own name.
func BuildTool(dir, command string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, command), "./cmd/"+command)
	cmd.Dir = filepath.Join(root, "e2e")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", command, err, out)
	}
	return nil
}

// FreeAddress returns a loopback address that nothing listens on at the moment.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// Eventually waits until the condition holds. If it does not within a generous time, the
// test fails with the condition's last error.
func Eventually(t testing.TB, what string, holds func() error) {
	t.Helper()
	EventuallyWithin(t, time.Minute, what, holds)
}

// EventuallyWithin is Eventually with a longer time.
func EventuallyWithin(t testing.TB, patience time.Duration, what string, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// process is a program that stops with the test.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

func start(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	endWithParent(cmd) // also when the tests panic
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(p.stop)
	return p
}

// stop interrupts the process, and kills it if it does not exit.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.exited:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// run runs a command until it exits, and returns its output.
func run(ctx context.Context, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// StartProgram starts a program that ends with the test, or when stop is called.
func StartProgram(t testing.TB, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	return start(t, cmd).stop
}
