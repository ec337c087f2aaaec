// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	gotoken "go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// This file compares the values in docs/limits.md with the constants in the code, in both
// directions. Each row of the document's tables has the value from the code. Each numeric
// constant is either in the document or listed in notLimits.

const limitsDoc = "docs/limits.md"

// limitsPackages has the directories to read constants from, by package.
var limitsPackages = map[string]string{
	"mojoauth": ".", "gate": "internal/gate", "lifetime": "internal/lifetime", "redact": "internal/redact",
}

// notLimits lists numeric constants that do not limit users or operators, and why.
var notLimits = map[string]string{
	"gate.backlog":      "when the pace increases; in docs/concepts.md",
	"gate.creepStep":    "how the pace increases; in docs/concepts.md",
	"gate.echo":         "how the pace decreases",
	"gate.maxLate":      "precision of the pace",
	"gate.probeStep":    "how the pace increases; in docs/concepts.md",
	"gate.safe":         "how the pace increases; in docs/concepts.md",
	"gate.steadyClosed": "how the pace increases; in docs/concepts.md",
	"gate.steadyFor":    "how the pace increases; in docs/concepts.md",
	"gate.steepStep":    "how the pace increases; in docs/concepts.md",
	"gate.wellAbove":    "how the pace increases; in docs/concepts.md",
	"gate.window":       "precision of the pace",

	"mojoauth.lookPause":          "in docs/concepts.md, for standbys",
	"mojoauth.maxReloads":         "internal",
	"mojoauth.longestReloadWait":  "internal",
	"mojoauth.shortestReloadWait": "internal",
	"mojoauth.patienceForNewer":   "internal",
	"mojoauth.precedence":         "internal",
	"mojoauth.rememberAloneFor":   "internal",
	"mojoauth.rememberFor":        "internal",
	"mojoauth.storeTimeout":       "internal",

	"redact.hashBase": "internal",
	"redact.maxRead":  "internal",
}

// codeConstants has the numeric constants by package and name.
type codeConstants struct {
	t      *testing.T
	values map[string]constant.Value
	used   map[string]bool
}

func readConstants(t *testing.T) *codeConstants {
	t.Helper()
	c := &codeConstants{t, make(map[string]constant.Value), make(map[string]bool)}
	for name, dir := range limitsPackages {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		var specs []*ast.ValueSpec
		for _, path := range files {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(gotoken.NewFileSet(), path, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if decl, ok := n.(*ast.GenDecl); ok && decl.Tok == gotoken.CONST {
					for _, spec := range decl.Specs {
						specs = append(specs, spec.(*ast.ValueSpec))
					}
				}
				return true
			})
		}
		for range 2 { // a constant may precede one that it depends on
			for _, spec := range specs {
				for i, value := range spec.Values {
					if v := c.eval(name, value); v != nil {
						c.values[name+"."+spec.Names[i].Name] = v
					}
				}
			}
		}
	}
	return c
}

// eval returns the value of a numeric expression, or nil for other expressions.
func (c *codeConstants) eval(pkg string, e ast.Expr) constant.Value {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == gotoken.INT || e.Kind == gotoken.FLOAT {
			return constant.MakeFromLiteral(e.Value, e.Kind, 0)
		}
	case *ast.Ident:
		return c.values[pkg+"."+e.Name]
	case *ast.SelectorExpr:
		units := map[string]time.Duration{
			"Nanosecond": time.Nanosecond, "Microsecond": time.Microsecond, "Millisecond": time.Millisecond,
			"Second": time.Second, "Minute": time.Minute, "Hour": time.Hour,
		}
		if unit, ok := units[e.Sel.Name]; ok {
			return constant.MakeInt64(int64(unit))
		}
	case *ast.ParenExpr:
		return c.eval(pkg, e.X)
	case *ast.BinaryExpr:
		x, y := c.eval(pkg, e.X), c.eval(pkg, e.Y)
		if x == nil || y == nil {
			return nil
		}
		if e.Op == gotoken.SHL {
			n, _ := constant.Uint64Val(y)
			return constant.Shift(x, gotoken.SHL, uint(n))
		}
		return constant.BinaryOp(x, e.Op, y)
	}
	return nil
}

func (c *codeConstants) number(name string) float64 {
	c.t.Helper()
	value, ok := c.values[name]
	if !ok {
		c.t.Fatalf("the code has no constant %s", name)
	}
	c.used[name] = true
	n, _ := constant.Float64Val(value)
	return n
}

// count returns the text for a constant that is a count.
func (c *codeConstants) count(name string) string {
	c.t.Helper()
	text := fmt.Sprint(int(c.number(name)))
	if len(text) > 3 {
		text = text[:len(text)-3] + "," + text[len(text)-3:]
	}
	return text
}

// time returns the text for a constant that is a duration.
func (c *codeConstants) time(name string) string {
	c.t.Helper()
	d := time.Duration(c.number(name))
	for _, unit := range []struct {
		length   time.Duration
		from     time.Duration
		singular string
		plural   string
	}{
		{24 * time.Hour, 48 * time.Hour, "day", "days"},
		{time.Hour, time.Hour, "hour", "hours"},
		{time.Minute, 2 * time.Minute, "minute", "minutes"},
		{time.Second, time.Second, "second", "seconds"},
		{time.Millisecond, time.Millisecond, "millisecond", "milliseconds"},
	} {
		switch n := d / unit.length; {
		case d < unit.from || d%unit.length != 0:
		case n == 1:
			return "1 " + unit.singular
		default:
			return fmt.Sprintf("%d %s", n, unit.plural)
		}
	}
	return d.String()
}

// size returns the text for a constant that is a number of bytes.
func (c *codeConstants) size(name string) string {
	c.t.Helper()
	return sizeText(int(c.number(name)))
}

func sizeText(bytes int) string {
	if bytes%1024 == 0 {
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d bytes", bytes)
}

// limits returns the values of all rows by their first cell.
func limits(c *codeConstants) map[string]string {
	rows := make(map[string]string)
	for field, bound := range bounds {
		switch {
		case field == "config":
		case bound.entries == 0:
			rows["`"+field+"`"] = sizeText(bound.bytes)
		default:
			rows["`"+field+"`"] = fmt.Sprintf("%d %s, %s in total", bound.entries, bound.what, sizeText(bound.bytes))
		}
	}
	maps.Copy(rows, map[string]string{
		"Any other parameter":        sizeText(boundOf("any other").bytes),
		"Name of a config or role":   c.count("mojoauth.longestName") + " characters",
		"Unknown parameters":         c.count("mojoauth.maxUnknownFields"),
		"Name of one":                c.count("mojoauth.longestUnknownField") + " bytes",
		"`request_timeout`":          c.time("mojoauth.minRequestTimeout") + " to " + c.time("mojoauth.maxRequestTimeout") + "; default " + c.time("mojoauth.defaultRequestTimeout"),
		"`max_retries`":              "0 to " + c.count("mojoauth.maxMaxRetries") + "; default " + c.count("mojoauth.defaultMaxRetries"),
		"`max_requests_per_second`":  "1 to " + c.count("mojoauth.maxMaxRequestsPerSecond") + "; default " + c.count("mojoauth.defaultMaxRequestsPerSecond"),
		"Time between verifications": c.time("mojoauth.verificationPause"),

		"Lifetime":                               c.time("lifetime.Longest"),
		"Lifetime that MojoAuth does not report": c.time("lifetime.Assumed"),
		"Short lifetime":                         c.time("mojoauth.shortestKeepable"),
		"Floor":                                  c.time("lifetime.maxFloor") + ", or a tenth of the lifetime if that is less",
		"Floor of a token that MojoAuth keeps returning": c.time("mojoauth.repeatedFloor"),
		"Lease margin":             c.time("lifetime.maxMargin") + ", or a tenth of the lifetime if that is less",
		"`ttl` of an old token":    c.time("lifetime.shortest") + " to " + c.time("lifetime.longest"),
		"Wait for a renewal":       c.time("mojoauth.patience"),
		"Mints for `minted_after`": "1 in " + c.time("mojoauth.demandPause"),
		"Scope subsets of a role":  c.count("mojoauth.maxNarrowedOfRole"),
		"Scope subsets of a mount": c.count("mojoauth.maxNarrowed"),

		"Pace at the start":           c.count("gate.firstRate") + " per second",
		"Slowest pace":                fmt.Sprintf("1 in %.0f seconds", 1/c.number("gate.slowestRate")),
		"Pace after throttling":       c.count("gate.recoveredRate") + " per second, from " + c.time("gate.recoverAfter") + " after the last 429",
		"`Retry-After` of MojoAuth":   c.time("mojoauth.longestRetryAfter"),
		"Roles that wait":             c.count("gate.maxPlaces"),
		"Requests in flight":          c.count("gate.maxInFlight"),
		"Rotations and verifications": "1 in " + c.count("gate.urgentShare") + " requests",
		"Scope subsets":               "1 in " + c.count("gate.narrowedShare") + " requests",

		"Pause before a retry":        c.time("mojoauth.shortestPause") + " to " + c.time("mojoauth.longestPause"),
		"Back-off":                    c.time("mojoauth.shortestBackoff") + " to " + c.time("mojoauth.longestBackoff"),
		"`Retry-After` of the engine": c.time("mojoauth.longestRetryAfterTold"),

		"Body, and header, of an answer": c.size("mojoauth.maxAnswerBytes") + " each",
		"Interim answers":                c.count("mojoauth.maxInterim"),
		"`token_type`":                   c.size("mojoauth.maxTokenType"),
		"`scope`":                        c.size("mojoauth.maxScope"),
		"Description of an error":        c.count("redact.longestLine") + " characters",
		"Echo of the client secret":      "Half of it, at least " + c.count("redact.fewest") + " characters",
		"Encodings that hide an echo":    c.count("redact.maxUndoings"),

		"Wait for storage during a mint":     c.time("mojoauth.storagePatience"),
		"Deletions in a request":             c.count("mojoauth.maxPrunedAtOnce"),
		"Time between sweeps":                c.time("mojoauth.sweepEvery"),
		"Pause between a sweep's operations": c.time("mojoauth.sweepPause"),
		"Closing a mount":                    c.time("mojoauth.closingTime"),
	})
	if c.number("gate.longestRetryAfter") != c.number("mojoauth.longestRetryAfter") {
		c.t.Error("the gate and the token responses have different limits for Retry-After")
	}
	return rows
}

func TestDocsLimits(t *testing.T) {
	content, err := os.ReadFile(limitsDoc)
	if err != nil {
		t.Fatal(err)
	}
	c := readConstants(t)
	code, listed := limits(c), make(map[string]bool)
	row := regexp.MustCompile(`^\| (.+?) \| (.+?) \| .+ \| .+ \|$`)
	for i, line := range strings.Split(string(content), "\n") {
		m := row.FindStringSubmatch(line)
		if m == nil || m[1] == "Limit" || m[1] == "---" {
			continue
		}
		listed[m[1]] = true
		switch want, ok := code[m[1]]; {
		case !ok:
			t.Errorf("%s, line %d: the test has no limit %q: remove the row, or add the limit to the test", limitsDoc, i+1, m[1])
		case m[2] != want:
			t.Errorf("%s, line %d: %s is %q, want %q as in the code", limitsDoc, i+1, m[1], m[2], want)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(code)) {
		if !listed[name] {
			t.Errorf("%s has no row for %s: add one with the value %q", limitsDoc, name, code[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.values)) {
		if !c.used[name] && notLimits[name] == "" {
			t.Errorf("%s is not in %s: add it, or list it in notLimits", name, limitsDoc)
		}
	}
	for name := range notLimits {
		if c.values[name] == nil || c.used[name] {
			t.Errorf("notLimits has %s, which is a limit or is not in the code: remove it", name)
		}
	}
}
