// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"go/types"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file compares the documents, except docs/api.md, with the code: file names,
// identifiers, figures, and the table of files in CONTRIBUTING.md.

func document(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// withoutCode returns a document without its code blocks.
func withoutCode(text string) string {
	return regexp.MustCompile("(?ms)^ *```.*?^ *```$").ReplaceAllString(text, "")
}

// tableRows returns the cells of each row of a table whose header begins with these cells.
func tableRows(t *testing.T, name string, header ...string) [][]string {
	t.Helper()
	cells := func(line string) []string {
		// No cell contains a \|.
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		return cells
	}
	var rows [][]string
	in := false
	for line := range strings.Lines(document(t, name)) {
		line = strings.TrimSpace(line)
		switch {
		case !strings.HasPrefix(line, "|"):
			in = false
		case in:
			rows = append(rows, cells(line))
		default:
			row := cells(line)
			in = len(row) >= len(header) && slices.Equal(row[:len(header)], header)
		}
	}
	if len(rows) < 2 {
		t.Fatalf("%s has no table with the header %q", name, header)
	}
	return rows[1:] // below the line of dashes
}

// code returns the texts in backquotes.
func code(text string) []string {
	var found []string
	for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

// The source files that the documents name exist.
func TestDocsFiles(t *testing.T) {
	file := regexp.MustCompile(`^(?:\.?[\w-]+/)*[\w.-]*\w\.(?:go|sh|yml|yaml|json|md|svg)$`)
	for _, name := range []string{"docs/concepts.md", "docs/operations.md", "docs/monitoring.md", "docs/architecture.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"} {
		found := 0
		for _, text := range code(withoutCode(document(t, name))) {
			if !file.MatchString(text) {
				continue
			}
			found++
			for _, root := range []string{".", "internal/gate", "cmd/" + pluginName} {
				if _, err := os.Stat(filepath.Join(root, text)); err == nil {
					text = ""
					break
				}
			}
			if text != "" {
				t.Errorf("%s names the file %s, which does not exist", name, text)
			}
		}
		if found == 0 && slices.Contains([]string{"docs/architecture.md", "CONTRIBUTING.md"}, name) {
			t.Errorf("%s names no file", name)
		}
	}
}

// sources has the syntax and types of this package without its tests. Types from imported
// packages are missing.
type sources struct {
	fset  *gotoken.FileSet
	files map[string]*ast.File
	pkg   *types.Package
	info  types.Info
}

// emptyImporter imports every package as an empty one.
type emptyImporter struct{}

func (emptyImporter) Import(name string) (*types.Package, error) {
	pkg := types.NewPackage(name, path.Base(regexp.MustCompile(`/v\d+$`).ReplaceAllString(name, "")))
	pkg.MarkComplete()
	return pkg, nil
}

var readSources = sync.OnceValues(func() (*sources, error) {
	names, err := filepath.Glob("*.go")
	if err != nil {
		return nil, err
	}
	s := &sources{fset: gotoken.NewFileSet(), files: make(map[string]*ast.File)}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(s.fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		s.files[name] = file
		files = append(files, file)
	}
	s.info = types.Info{Uses: make(map[*ast.Ident]types.Object)}
	config := types.Config{Importer: emptyImporter{}, Error: func(error) {}}
	s.pkg, _ = config.Check("mojoauth", s.fset, files, &s.info) // reports errors for imported names
	return s, nil
})

func packageSources(t *testing.T) *sources {
	t.Helper()
	s, err := readSources()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// uses returns the identifiers that a file uses and that another file of the package
// declares. The map has the declaring file by identifier.
func (s *sources) uses(name string) map[string]string {
	used := make(map[string]string)
	for ident, object := range s.info.Uses {
		if object.Pkg() != s.pkg || s.fset.Position(ident.Pos()).Filename != name {
			continue
		}
		if declared := s.fset.Position(object.Pos()).Filename; declared != name {
			used[object.Name()] = declared
		}
	}
	return used
}

func imports(file *ast.File) []string {
	var paths []string
	for _, spec := range file.Imports {
		if p, err := strconv.Unquote(spec.Path.Value); err == nil {
			paths = append(paths, p)
		}
	}
	return paths
}

// independence has the rule for each claim in the table of files in CONTRIBUTING.md. A rule
// lists what a file may not import, the files whose declarations it may not use, and the
// identifiers that it may not contain.
var independence = map[string]struct {
	imports []string // including subpackages
	files   []string
	names   []string
}{
	"Vault":             {imports: []string{"github.com/hashicorp/vault", "github.com/openbao"}},
	"HTTP":              {imports: []string{"net/http", "golang.org/x/oauth2"}},
	"the cache":         {files: []string{"token_cache.go", "slot.go", "cached_token.go", "token_store.go", "restoring.go"}},
	"slots":             {files: []string{"slot.go", "cached_token.go"}},
	"stored tokens":     {files: []string{"token_store.go"}},
	"configs and roles": {files: []string{"path_config.go", "path_roles.go"}},
	"token requests":    {files: []string{"client.go"}},
	"secret values":     {names: []string{"ClientSecret", "accessToken"}},
	"the engine":        {imports: []string{modulePath}, files: []string{"*.go"}},
}

const modulePath = "github.com/mojoauth/vault-plugin-secrets-mojoauth"

// The table of files in CONTRIBUTING.md lists every file of the package, and its claims about
// their independence are true.
func TestIndependentFiles(t *testing.T) {
	s := packageSources(t)
	for claim, rule := range independence {
		for _, name := range rule.files {
			if s.files[name] == nil && name != "*.go" {
				t.Errorf("%q is about the file %s, which does not exist", claim, name)
			}
		}
	}
	for _, name := range independence["secret values"].names {
		found := false
		for _, file := range s.files {
			ast.Inspect(file, func(n ast.Node) bool {
				ident, ok := n.(*ast.Ident)
				found = found || ok && ident.Name == name
				return true
			})
		}
		if !found {
			t.Errorf("no file contains the identifier %s", name)
		}
	}

	listed := make(map[string]bool)
	checked := 0
	for _, row := range tableRows(t, "CONTRIBUTING.md", "File", "Responsible for", "Independent of") {
		claim, _, _ := strings.Cut(row[2], ":")
		for _, name := range code(row[0]) {
			listed[name] = true
			files := map[string]*ast.File{name: s.files[name]}
			if !strings.HasSuffix(name, ".go") || strings.Contains(name, "/") {
				files = parseDirectory(t, name)
			}
			for _, what := range strings.Split(claim, ",") {
				what = strings.TrimSpace(what)
				if what == "" {
					continue
				}
				// The first claim in a cell begins with a capital letter.
				if _, ok := independence[what]; !ok {
					what = strings.ToLower(what[:1]) + what[1:]
				}
				rule, ok := independence[what]
				if !ok {
					t.Errorf("%s: the claim %q has no rule: add one to independence in documents_test.go", name, what)
					continue
				}
				if len(files) == 0 {
					t.Errorf("%s has no Go files to check", name)
				}
				for _, inner := range slices.Sorted(maps.Keys(files)) {
					checked++
					if files[inner] == nil {
						t.Errorf("CONTRIBUTING.md lists %s, which does not exist", inner)
						continue
					}
					for _, imported := range imports(files[inner]) {
						for _, forbidden := range rule.imports {
							if forbidden == modulePath && imported != modulePath && !strings.HasPrefix(imported, modulePath+"/internal/") {
								continue // an e2e or cmd package of this repository
							}
							if imported == forbidden || strings.HasPrefix(imported, forbidden+"/") {
								t.Errorf("%s is not independent of %s: it imports %s", inner, what, imported)
							}
						}
					}
					for used, declared := range s.uses(inner) {
						if slices.Contains(rule.files, declared) || slices.Contains(rule.files, "*.go") {
							t.Errorf("%s is not independent of %s: it uses %s of %s", inner, what, used, declared)
						}
					}
					ast.Inspect(files[inner], func(n ast.Node) bool {
						if ident, ok := n.(*ast.Ident); ok && slices.Contains(rule.names, ident.Name) {
							t.Errorf("%s is not independent of %s: it names %s", inner, what, ident.Name)
						}
						return true
					})
				}
			}
		}
	}
	for name := range s.files {
		if !listed[name] {
			t.Errorf("CONTRIBUTING.md does not list %s: add it with its responsibility", name)
		}
	}
	if checked < 50 {
		t.Errorf("checked only %d claims, want at least 50", checked)
	}
}

// parseDirectory parses the imports of the Go files in a directory, or of one Go file outside
// this package. It skips the tests of internal packages.
func parseDirectory(t *testing.T, name string) map[string]*ast.File {
	t.Helper()
	var names []string
	err := filepath.WalkDir(name, func(name string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(name, ".go") {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(name, "internal/") {
		names = slices.DeleteFunc(names, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
	}
	files := make(map[string]*ast.File)
	for _, name := range names {
		file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = file
	}
	return files
}

// The identifiers that docs/architecture.md and the example in CONTRIBUTING.md name exist.
func TestDocsIdentifiers(t *testing.T) {
	s := packageSources(t)
	known := make(map[string]bool)
	collect := func(file *ast.File) {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				known[n.Name] = true
			case *ast.BasicLit: // fields, paths and tags
				for _, word := range regexp.MustCompile(`\w+`).FindAllString(n.Value, -1) {
					known[word] = true
				}
			}
			return true
		})
	}
	for _, file := range s.files {
		collect(file)
	}
	for _, directory := range []string{"internal/gate", "cmd/" + pluginName} {
		names, err := filepath.Glob(filepath.Join(directory, "*.go"))
		if err != nil || len(names) == 0 {
			t.Fatalf("%s: got %q, %v", directory, names, err)
		}
		for _, name := range names {
			file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			collect(file)
		}
	}
	for _, word := range []string{"true", "false", "GOGC"} {
		known[word] = true
	}

	identifier := regexp.MustCompile(`^\w+(?:\.\w+)?$`)
	checked := 0
	for _, text := range code(withoutCode(document(t, "docs/architecture.md"))) {
		if !identifier.MatchString(text) || strings.HasSuffix(text, ".go") {
			continue
		}
		checked++
		first, second, _ := strings.Cut(text, ".")
		if !known[first] || second != "" && !known[second] {
			t.Errorf("docs/architecture.md names %s, which does not exist", text)
			continue
		}
		if owner, ok := s.pkg.Scope().Lookup(first).(*types.TypeName); ok && second != "" {
			if found, _, _ := types.LookupFieldOrMethod(owner.Type(), true, s.pkg, second); found == nil {
				t.Errorf("docs/architecture.md names %s, but %s has no %s", text, first, second)
			}
		}
	}
	if checked < 50 {
		t.Errorf("checked only %d identifiers, want at least 50", checked)
	}

	_, example, _ := strings.Cut(document(t, "CONTRIBUTING.md"), "\n## An example")
	for _, name := range []string{
		"asksSameAs", "mergeRole", "TokenGeneration", "rolePrefix", "roleEntry", "GenerateLease", "roleFields", "validate",
		"bounds", "toResponseData", "roleOperations", "request", "protocol", "mergeConfig",
	} {
		if !known[name] {
			t.Errorf("%s no longer exists: correct the example in CONTRIBUTING.md", name)
		}
		if !strings.Contains(example, name) {
			t.Errorf("the example in CONTRIBUTING.md no longer names %s: remove it from this test", name)
		}
	}
	for _, name := range []string{"maxDescription", "TestRoleDescription"} {
		if known[name] {
			t.Errorf("%s exists: use another field in the example in CONTRIBUTING.md", name)
		}
	}
}

// docs/monitoring.md lists all metrics with their types and labels.
func TestDocsMetrics(t *testing.T) {
	text := document(t, "docs/monitoring.md")
	listed := make(map[string][]string)
	for _, row := range tableRows(t, "docs/monitoring.md", "Metric", "Type", "Labels") {
		for _, name := range code(row[0]) {
			listed[name] = append([]string{row[1]}, slices.Sorted(slices.Values(code(row[2])))...)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		aBadDay(m)
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(m.metrics()))
		if err != nil {
			t.Fatal(err)
		}
		for name, family := range families {
			if !strings.HasPrefix(name, "mojoauth_") {
				continue
			}
			want := []string{strings.ToLower(family.GetType().String())}
			for _, label := range family.GetMetric()[0].GetLabel() {
				want = append(want, label.GetName())
			}
			slices.Sort(want[1:])
			if got := listed[name]; !slices.Equal(got, want) {
				t.Errorf("%s: docs/monitoring.md has the type and labels %q, want %q", name, got, want)
			}
			delete(listed, name)
		}
	})
	for name := range listed {
		if strings.HasPrefix(name, "mojoauth_") {
			t.Errorf("docs/monitoring.md lists %s, which does not exist", name)
		}
	}
	for _, how := range outcomes {
		if !strings.Contains(text, "`"+string(how)+"`") {
			t.Errorf("docs/monitoring.md does not name the outcome %s", how)
		}
	}
	for _, operation := range storeOperations {
		if !strings.Contains(text, "`"+operation+"`") {
			t.Errorf("docs/monitoring.md does not name the operation %s", operation)
		}
	}
	for _, answer := range answers {
		if !strings.Contains(text, "`"+answer+"`") {
			t.Errorf("docs/monitoring.md does not name the result %s", answer)
		}
	}

	backsOff := make(map[string]string)
	for _, row := range tableRows(t, "docs/monitoring.md", "Class", "Meaning", "What backs off") {
		backsOff[code(row[0])[0]] = row[2]
	}
	for _, result := range results {
		want := "The config"
		switch failed := (&mintError{class: errorClass(result)}); {
		case result == resultOK:
			continue
		case result == resultNoTurn:
			want = "Nothing"
		case failed.concernsRequest():
			want = "The key"
		}
		if got := backsOff[result]; got != want {
			t.Errorf("docs/monitoring.md: the class %s backs off %q, want %q", result, got, want)
		}
		delete(backsOff, result)
	}
	for class := range backsOff {
		t.Errorf("docs/monitoring.md lists the class %s, which does not exist", class)
	}
}

// docs/monitoring.md lists all alerts with their severities.
func TestDocsAlerts(t *testing.T) {
	rules := document(t, "deploy/monitoring/alerts.yml")
	var want, got []string
	for _, m := range regexp.MustCompile(`(?s)- alert: (\w+)\n.*?severity: (\w+)\n`).FindAllStringSubmatch(rules, -1) {
		want = append(want, m[1]+" "+m[2])
	}
	for _, row := range tableRows(t, "docs/monitoring.md", "Alert", "Severity") {
		got = append(got, code(row[0])[0]+" "+row[1])
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("docs/monitoring.md lists the alerts\n%q, want\n%q", got, want)
	}
	for _, name := range []string{"deploy/monitoring/alerts.yml", "deploy/monitoring/grafana-dashboard.json"} {
		for _, metric := range regexp.MustCompile(`mojoauth_[a-z_]+`).FindAllString(document(t, name), -1) {
			if !strings.Contains(document(t, "docs/monitoring.md"), "`"+strings.TrimSuffix(metric, "_bucket")+"`") {
				t.Errorf("%s uses the metric %s, which docs/monitoring.md does not list", name, metric)
			}
		}
	}
}

// The glossary lists each term once, and the documents use its terms.
func TestDocsGlossary(t *testing.T) {
	seen := make(map[string]bool)
	for _, row := range tableRows(t, "docs/concepts.md", "Term", "Meaning") {
		if seen[row[0]] {
			t.Errorf("the glossary lists the term %q twice", row[0])
		}
		seen[row[0]] = true
	}
	for _, name := range []string{"docs/concepts.md", "docs/operations.md", "docs/monitoring.md", "docs/architecture.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"} {
		text := withoutCode(document(t, name))
		for _, word := range []string{"spent", "narrowed set", "whole scopes", "whoever", "anew", "mended", "licence", "behaviour"} {
			if m := regexp.MustCompile(`(?i)\b` + word).FindString(text); m != "" {
				t.Errorf("%s contains %q: use the glossary's term", name, m)
			}
		}
	}
}

// The figures in the documents match the code.
func TestDocsFigures(t *testing.T) {
	hour := lifetime.New(time.Hour, 0)
	minutes := func(d time.Duration) string { return fmt.Sprintf("%g min", d.Minutes()) }
	for i, want := range []time.Duration{hour.Lifetime, hour.Refresh, hour.Margin, hour.Floor, (hour.Refresh - hour.Margin) / 2} {
		if row := tableRows(t, "docs/concepts.md", "Symbol", "Name", "Formula")[i]; row[3] != minutes(want) {
			t.Errorf("docs/concepts.md: %s is %s for one hour, want %s", row[0], row[3], minutes(want))
		}
	}
	if got := lifetime.New(time.Hour, 2*time.Hour).Refresh; got != 48*time.Minute {
		t.Errorf("0.8 L of an hour is %s: correct docs/operations.md", got)
	}
	if early, late := hour.Ahead(0)-hour.Refresh, hour.Ahead(1)-hour.Refresh; early != 36*time.Second || late != 3*time.Minute {
		t.Errorf("renewals are spread over %s to %s: correct docs/concepts.md", early, late)
	}
	// On average, the engine replaces a token after L - R minus the average spread.
	if got := (hour.Lifetime - hour.Ahead(0.5)).Seconds() / 3600; math.Abs(got-0.72) > 0.001 {
		t.Errorf("a role in use causes a token request every %.3f L: correct docs/operations.md", got)
	}
	for _, figure := range []struct {
		document string
		text     string // a format for the figures
		figures  []any
	}{
		{"docs/concepts.md", "for %d s, then 10 s, 20 s and %d s, minus a random share of up to a fifth", []any{seconds(shortestBackoff), seconds(longestBackoff)}},
		{"docs/concepts.md", "A read that finds a due token waits up to %d seconds", []any{seconds(patience)}},
		{"docs/concepts.md", "The engine mints for this reason at most once in %d seconds", []any{seconds(demandPause)}},
		{"docs/concepts.md", "which takes at most %d second.", []any{seconds(storagePatience)}},
		{"docs/concepts.md", "until %d seconds before `expires_at`, with a warning", []any{seconds(repeatedFloor)}},
		{"docs/concepts.md", "More than %d scope subsets of a role are read", []any{maxNarrowedOfRole}},
		{"docs/concepts.md", "More than %s scope subsets are read in a mount", []any{thousands(maxNarrowed)}},
		{"docs/concepts.md", "`max_ttl`, or %d minutes with a warning", []any{int(lifetime.Assumed.Minutes())}},
		{"docs/operations.md", "at most %d for each role and %s for each mount", []any{maxNarrowedOfRole, thousands(maxNarrowed)}},
		{"docs/operations.md", "`max_requests_per_second`, %d by default", []any{defaultMaxRequestsPerSecond}},
		{"docs/operations.md", "By default, a read waits up to %d seconds", []any{seconds(defaultRequestTimeout) + 1}},
		{"docs/operations.md", "after %d, 10, 20, %d, 30 ... seconds", []any{seconds(shortestBackoff), seconds(longestBackoff)}},
		{"docs/operations.md", "With `max_retries` at %d", []any{defaultMaxRetries}},
		{"docs/operations.md", "waits up to %d seconds until tokens are stored", []any{seconds(closingTime)}},
		{"docs/architecture.md", "deletion of its tokens: %d immediately", []any{maxPrunedAtOnce}},
		{"docs/architecture.md", "waits up to %d seconds for the goroutines", []any{seconds(closingTime)}},
		{"docs/architecture.md", "up to %d slots for each role and %s for each mount", []any{maxNarrowedOfRole, thousands(maxNarrowed)}},
		{"SECURITY.md", "wait at most %d seconds for the engine", []any{seconds(closingTime)}},
		{"SECURITY.md", "| %s, %s, %s, %s |", []any{kib("token_url"), kib("client_id"), kib("client_secret"), kib("ca_cert")}},
		{"SECURITY.md", "| %s; %d scopes of %s together; %d entries of %s together |", []any{kib("audience"), bounds["scopes"].entries, kib("scopes"), bounds["extra_params"].entries, kib("extra_params")}},
		{"SECURITY.md", "| A name | %d characters |", []any{longestName}},
		{"SECURITY.md", "| Parameters that the path does not have | %d |", []any{maxUnknownFields}},
		{"SECURITY.md", "its body, and its header | %d KiB each", []any{maxAnswerBytes >> 10}},
		{"SECURITY.md", "for scope subsets %d for each role and %s for each mount", []any{maxNarrowedOfRole, thousands(maxNarrowed)}},
		{"SECURITY.md", "`max_requests_per_second` (at most %s) in any second", []any{thousands(maxMaxRequestsPerSecond)}},
		{"CHANGELOG.md", "`max_requests_per_second` (%d by default)", []any{defaultMaxRequestsPerSecond}},
		{"CHANGELOG.md", "at most %d scope subsets", []any{maxNarrowedOfRole}},
	} {
		if want := fmt.Sprintf(figure.text, figure.figures...); !strings.Contains(inOneLine(document(t, figure.document)), want) {
			t.Errorf("%s does not contain %q: correct the figure, or the sentence in this test", figure.document, want)
		}
	}
	if rate := float64(time.Second) / float64(sweepPause); rate > 100 {
		t.Errorf("the sweep does %.0f operations a second: correct docs/operations.md and SECURITY.md", rate)
	}
}

func inOneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

func seconds(d time.Duration) int { return int(d.Seconds()) }

func thousands(n int) string { return fmt.Sprintf("%d,%03d", n/1000, n%1000) }

// kib returns the size limit of a field.
func kib(field string) string { return fmt.Sprintf("%d KiB", bounds[field].bytes>>10) }

// The table of first starts in docs/operations.md matches the gate, for an endpoint that
// responds in 100 ms.
func TestDocsFirstStart(t *testing.T) {
	limits := []int{5, 20, 50, 100}
	for _, row := range tableRows(t, "docs/operations.md", "Roles", "Limit 5") {
		roles, err := strconv.Atoi(strings.ReplaceAll(row[0], ",", ""))
		if err != nil {
			t.Fatal(err)
		}
		if roles > 1000 && underRaceDetector() {
			continue // the race detector supports at most 8,128 goroutines
		}
		for i, limit := range limits {
			figure, unit, _ := strings.Cut(row[i+1], " ")
			want, err := strconv.ParseFloat(figure, 64)
			if err != nil {
				t.Fatal(err)
			}
			per := map[string]time.Duration{"s": time.Second, "min": time.Minute}[unit]
			last, _ := firstStart(t, roles, limit, 100*time.Millisecond)
			got := float64(last) / float64(per)
			// Allow a difference of one in the last digit that the table shows.
			step := 1.0
			if strings.Contains(figure, ".") {
				step = 0.1
			}
			if math.Abs(got-want) > step {
				t.Errorf("%d roles at a limit of %d: the table has %s, but the gate takes %.2f %s", roles, limit, row[i+1], got, unit)
			}
		}
	}
	fast, within := firstStart(t, 300, 20, 100*time.Millisecond)
	if within < 190 || within > 205 {
		t.Errorf("got %d responses within 11 s, want 190 to 205 as in docs/operations.md", within)
	}
	slow, _ := firstStart(t, 300, 20, time.Second)
	if more := slow - fast; more > 3*time.Second {
		t.Errorf("an endpoint that takes a second adds %s, want at most 3 s as in docs/operations.md", more)
	}
}

// firstStart returns how long it takes until every role has its first token, and how many
// roles have one within 11 s.
func firstStart(t *testing.T, roles, limit int, latency time.Duration) (last time.Duration, within int) {
	synctest.Test(t, func(t *testing.T) {
		var (
			g     = gate.New(limit, nil)
			began = time.Now()
			mu    sync.Mutex
			wg    sync.WaitGroup
		)
		for i := range roles {
			turn := g.Turn(strconv.Itoa(i), gate.Whole)
			turn.Join(time.Time{}, began)
			wg.Go(func() {
				pass, err := turn.Wait(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(latency)
				pass.Done(gate.Answered, 0)
				mu.Lock()
				defer mu.Unlock()
				took := time.Since(began)
				last = max(last, took)
				if took <= longestRead {
					within++
				}
			})
		}
		wg.Wait()
		g.Close()
	})
	return last, within
}

// longestRead is the longest wait of a read with the default settings.
const longestRead = defaultRequestTimeout + time.Second

func underRaceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
