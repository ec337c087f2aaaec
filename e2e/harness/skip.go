// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"fmt"
	"os"
	"sync"
	"testing"
)

var (
	untestedMu sync.Mutex
	untested   []string
)

// Untested returns what the tests so far have left out, each with its reason.
func Untested() []string {
	untestedMu.Lock()
	defer untestedMu.Unlock()
	return append([]string(nil), untested...)
}

// NotTested records something that a test leaves out. The run lists it at its end.
func NotTested(t testing.TB, reason string) {
	t.Helper()
	t.Log("NOT TESTED: " + reason)
	untestedMu.Lock()
	defer untestedMu.Unlock()
	untested = append(untested, t.Name()+": "+reason)
}

// Skip skips a test, and the run lists it at its end. Tests must not skip in any other
// way.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	NotTested(t, fmt.Sprintf(format, args...))
	t.SkipNow()
}

// Skip skips a test that the difference makes pointless in a product.
func (d Difference) Skip(t testing.TB, in Product) {
	t.Helper()
	if in.Has(d) {
		Skip(t, "%s", d)
	}
}

// Once skips a test of the plugin's own figures if the same run continues in another
// server. Such a test takes minutes, and its figures are the same in each server.
func Once(t testing.TB) {
	t.Helper()
	if next := os.Getenv("E2E_NEXT"); next != "" {
		Skip(t, "measured once per run, in %s, which follows", next)
	}
}

// Missing skips a test because this machine lacks something. In CI, which has everything,
// the test fails instead.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	Skip(t, format, args...)
}
