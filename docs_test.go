// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file compares docs/api.md with the code: with the paths, operations, fields and
// responses that the backend declares, and with the texts it returns. It reads the
// document line by line, by these rules:
//
//   - "## Title" begins a section. A section with rows of operations documents
//     these operations; all other sections are prose.
//   - "| `METHOD` | `/mojoauth/path/:field` |" is the row of an operation. POST
//     stands for create and update.
//   - "### Title" begins a part of a section.
//   - In the part "Parameters", "- `name` `(type: default)` – Text" at the
//     beginning of a line is a parameter. The default is JSON, a Go duration if the
//     type is duration, or <required>.
//   - In the part "Response", "- `key` `(type)` – Text" at the beginning of a line
//     is a key of the response's data.
//   - In parts whose title begins with "Sample payload", a ```json block is an object of
//     parameters.
//   - In parts whose title begins with "Sample response", a ```json block is an
//     object whose "data" has all keys of the response and no others.
//   - The text of an error or a warning is in backquotes, on one line.
//   - A field is required if its schema says so, or if its description has the
//     sentence "Required.": the framework has no fields that only a create
//     requires.
//
// A list of parameters has what the operation accepts: the fields in the path, and in
// addition the fields with Query for GET, those without it for POST, and none for DELETE,
// LIST and RECOVER.

const apiDoc = "docs/api.md"

var (
	docOperationRow = regexp.MustCompile("^\\| `([A-Z]+)` +\\| `/mojoauth/([^`]*)` +\\|$")
	docParameter    = regexp.MustCompile("^- `([^`]+)` `\\(([a-z]+): (.+)\\)` – \\S")
	docResponseKey  = regexp.MustCompile("^- `([^`]+)` `\\(([a-z]+)\\)` – \\S")
)

// docMethods maps a method in the document to the operations it stands for.
var docMethods = map[string][]logical.Operation{
	"GET":    {logical.ReadOperation},
	"POST":   {logical.CreateOperation, logical.UpdateOperation},
	"DELETE": {logical.DeleteOperation},
	"LIST":   {logical.ListOperation},
	// Vault supports this method; it also accepts a POST with a header.
	"RECOVER": {logical.RecoverOperation},
}

// docTypes has the document's names for types.
var docTypes = map[framework.FieldType]string{
	framework.TypeString:           "string",
	framework.TypeLowerCaseString:  "string",
	framework.TypeInt:              "int",
	framework.TypeInt64:            "int",
	framework.TypeBool:             "bool",
	framework.TypeDurationSecond:   "duration",
	framework.TypeStringSlice:      "list",
	framework.TypeCommaStringSlice: "list",
	framework.TypeKVPairs:          "map",
	framework.TypeMap:              "map",
}

// docKinds has the kind of a sample's value once it is decoded from JSON.
var docKinds = map[string]reflect.Kind{
	"string": reflect.String,
	"int":    reflect.Float64,
	"bool":   reflect.Bool,
	"list":   reflect.Slice,
	"map":    reflect.Map,
}

// docSection is a section that documents operations.
type docSection struct {
	title      string
	operations []docOperation
	parameters map[string]string // "type: default" by name
	response   map[string]string // type by key
	payloads   []map[string]any
	samples    []map[string]any // the data of sample responses
}

type docOperation struct{ method, path string }

func (o docOperation) String() string { return o.method + " /mojoauth/" + o.path }

// has reports whether :name is in the path.
func (o docOperation) has(name string) bool {
	return slices.Contains(strings.Split(o.path, "/"), ":"+name)
}

// readDoc reads the sections that document operations.
func readDoc(t *testing.T) []*docSection {
	t.Helper()
	content, err := os.ReadFile(apiDoc)
	if err != nil {
		t.Fatal(err)
	}
	var (
		sections []*docSection
		s        *docSection
		part     string           // title of the part, "" before the first
		fence    string           // what opened the block, "" outside a block
		block    *strings.Builder // its lines
	)
	number := 0
	for line := range strings.Lines(string(content)) {
		number++
		line = strings.TrimSuffix(line, "\n")
		fail := func(format string, args ...any) {
			t.Helper()
			t.Errorf("%s:%d: %s", apiDoc, number, fmt.Sprintf(format, args...))
		}
		switch {
		case fence != "" && line == "```":
			if fence == "```json" && s != nil {
				s.addBlock(part, block.String(), fail)
			}
			fence = ""
		case fence != "":
			block.WriteString(line + "\n")
		case strings.HasPrefix(line, "```"):
			fence, block = line, new(strings.Builder)
		case strings.HasPrefix(line, "## "):
			s, part = &docSection{title: line[3:], parameters: map[string]string{}, response: map[string]string{}}, ""
			sections = append(sections, s)
		case strings.HasPrefix(line, "### "):
			part = line[4:]
		case s != nil:
			s.addLine(part, line, fail)
		}
	}
	return slices.DeleteFunc(sections, func(s *docSection) bool { return len(s.operations) == 0 })
}

func (s *docSection) addLine(part, line string, fail func(string, ...any)) {
	add := func(fields map[string]string, rule *regexp.Regexp, form string) {
		m := rule.FindStringSubmatch(line)
		switch {
		case !strings.HasPrefix(line, "- "):
		case m == nil:
			fail("write the line as %s", form)
		case fields[m[1]] != "":
			fail("%s is listed twice: remove one", m[1])
		default:
			fields[m[1]] = strings.Join(m[2:], ": ")
		}
	}
	switch part {
	case "":
		if m := docOperationRow.FindStringSubmatch(line); m != nil {
			s.operations = append(s.operations, docOperation{m[1], m[2]})
		} else if strings.Contains(line, "`/mojoauth/") {
			fail("write the line as | `METHOD` | `/mojoauth/path/:field` |")
		}
	case "Parameters":
		add(s.parameters, docParameter, "- `name` `(type: default)` – Text")
	case "Response":
		add(s.response, docResponseKey, "- `key` `(type)` – Text")
	}
}

func (s *docSection) addBlock(part, block string, fail func(string, ...any)) {
	if len(s.operations) == 0 {
		return
	}
	var object map[string]any
	if err := json.Unmarshal([]byte(block), &object); err != nil {
		fail("the block that ends here is not a JSON object: %v", err)
		return
	}
	switch {
	case strings.HasPrefix(part, "Sample payload"):
		s.payloads = append(s.payloads, object)
	case strings.HasPrefix(part, "Sample response") && object["errors"] == nil:
		data, _ := object["data"].(map[string]any)
		s.samples = append(s.samples, data)
	}
}

// docRoute finds the backend's path for an operation of the document, and the names of
// the fields in it.
func docRoute(b *backend, o docOperation) (path *framework.Path, inPath []string, err error) {
	if _, ok := docMethods[o.method]; !ok {
		return nil, nil, fmt.Errorf("%s: there is no such method: use one of %q", o, slices.Sorted(maps.Keys(docMethods)))
	}
	// :name stands for any name, including its own.
	request := strings.ReplaceAll(o.path, ":", "")
	if o.method == "LIST" {
		request += "/" // as Vault does
	}
	path = b.Route(request)
	if path == nil {
		return nil, nil, fmt.Errorf("%s: the backend has no such path: remove the row, or correct its path", o)
	}
	pattern := regexp.MustCompile(path.Pattern)
	for i, value := range pattern.FindStringSubmatch(request) {
		name := pattern.SubexpNames()[i]
		if name == "" {
			continue
		}
		if name != value || !o.has(name) {
			return nil, nil, fmt.Errorf("%s: the part of the path that is %q in the code is not :%s: rename it", o, name, name)
		}
		inPath = append(inPath, name)
	}
	return path, inPath, nil
}

// docParameters returns the parameters that the document should list for an operation.
func docParameters(o docOperation, path *framework.Path, inPath []string) map[string]string {
	parameters := make(map[string]string)
	for name, schema := range path.Fields {
		if slices.Contains(inPath, name) || o.method == "GET" && schema.Query || o.method == "POST" && !schema.Query {
			parameters[name] = docTypeOf(schema) + ": " + docDefaultOf(schema)
		}
	}
	return parameters
}

func docTypeOf(schema *framework.FieldSchema) string {
	if name, ok := docTypes[schema.Type]; ok {
		return name
	}
	return fmt.Sprintf("%s, which has no name in docTypes in docs_test.go", schema.Type)
}

func docDefaultOf(schema *framework.FieldSchema) string {
	value := schema.DefaultOrZero()
	switch {
	case schema.Required || strings.Contains(schema.Description, "Required."):
		return "<required>"
	case schema.Type == framework.TypeDurationSecond:
		return (time.Duration(value.(int)) * time.Second).String()
	}
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// docResponse returns the response keys that the document should list for an operation.
func docResponse(op *framework.OperationProperties) map[string]string {
	keys := make(map[string]string)
	for _, response := range op.Responses[200] {
		for key, schema := range response.Fields {
			keys[key] = docTypeOf(schema)
		}
	}
	return keys
}

// Every operation of the backend has one row in the document, and every row has an
// operation.
func TestDocsOperations(t *testing.T) {
	b := newBackend(nil)
	type operation struct {
		pattern string
		op      logical.Operation
	}
	rows := map[operation]int{}
	for _, s := range readDoc(t) {
		for _, row := range s.operations {
			path, _, err := docRoute(b, row)
			if err != nil {
				t.Error(err)
				continue
			}
			n := 0
			for _, op := range docMethods[row.method] {
				if path.Operations[op] != nil {
					rows[operation{path.Pattern, op}]++
					n++
				}
			}
			if n == 0 {
				t.Errorf("%s: the path %s has no such operation in the code: remove the row from section %q", row, path.Pattern, s.title)
			}
		}
	}
	for _, path := range b.Paths {
		for op := range path.Operations {
			switch n := rows[operation{path.Pattern, op}]; n {
			case 1:
			case 0:
				t.Errorf("%s has no row for the %s of the path %s: document it", apiDoc, op, path.Pattern)
			default:
				t.Errorf("%s has %d rows for the %s of the path %s: leave one", apiDoc, n, op, path.Pattern)
			}
		}
	}
}

// Parameters and response keys match the code in name, type and default.
func TestDocsFields(t *testing.T) {
	b := newBackend(nil)
	for _, s := range readDoc(t) {
		t.Run(s.title, func(t *testing.T) {
			for _, row := range s.operations {
				path, inPath, err := docRoute(b, row)
				if err != nil {
					t.Fatal(err)
				}
				// A section may have one path with a field in it and one without.
				listed := maps.Clone(s.parameters)
				maps.DeleteFunc(listed, func(name, _ string) bool {
					return !slices.Contains(inPath, name) && slices.ContainsFunc(s.operations, func(o docOperation) bool { return o.has(name) })
				})
				docCompare(t, row.String(), "parameter", listed, docParameters(row, path, inPath))
				for _, op := range docMethods[row.method] {
					if handler := path.Operations[op]; handler != nil {
						properties := handler.Properties()
						docCompare(t, row.String(), "response key", s.response, docResponse(&properties))
					}
				}
			}
		})
	}
}

// docCompare reports differences between what the document lists and what the code has.
func docCompare(t *testing.T, where, what string, doc, code map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(code)) {
		if doc[name] == "" {
			t.Errorf("%s: %s %s is missing in %s: list it with `(%s)`", where, what, name, apiDoc, code[name])
		} else if doc[name] != code[name] {
			t.Errorf("%s: %s %s is `(%s)` in %s but `(%s)` in the code: correct the one that is wrong", where, what, name, doc[name], apiDoc, code[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(doc)) {
		if code[name] == "" {
			t.Errorf("%s: %s %s is in %s but not in the code: remove it, or declare it", where, what, name, apiDoc)
		}
	}
}

// Samples have the keys that the section lists.
func TestDocsSamples(t *testing.T) {
	for _, s := range readDoc(t) {
		t.Run(s.title, func(t *testing.T) {
			if len(s.response) > 0 && len(s.samples) == 0 {
				t.Error("no sample response in JSON: add one")
			}
			for i, sample := range s.samples {
				where := fmt.Sprintf("sample response %d", i+1)
				for _, key := range slices.Sorted(maps.Keys(s.response)) {
					value, ok := sample[key]
					if !ok {
						t.Errorf("%s: its data has no key %s: add it", where, key)
					} else if got, want := reflect.ValueOf(value).Kind(), docKinds[s.response[key]]; got != want {
						t.Errorf("%s: the value of %s is a %s, but the key is listed as %s: correct one of them", where, key, got, s.response[key])
					}
				}
				for _, key := range slices.Sorted(maps.Keys(sample)) {
					if s.response[key] == "" {
						t.Errorf("%s: the key %s is not listed in the part Response: remove it, or list it", where, key)
					}
				}
			}
			for _, payload := range s.payloads {
				for _, name := range slices.Sorted(maps.Keys(payload)) {
					if s.parameters[name] == "" {
						t.Errorf("sample payload: %s is not a parameter of this section: remove it", name)
					}
				}
			}
		})
	}
}

// Texts of errors and warnings consist of those that docs/troubleshooting.md lists.
func TestDocsTexts(t *testing.T) {
	rows := docTexts(t)

	type fields = map[string]any
	const (
		read  = logical.ReadOperation
		write = logical.UpdateOperation
	)
	both := fields{"scopes": "read:reports,write:reports"}
	fails := func(failure error) func(*testMount) {
		return func(m *testMount) {
			m.configure("reports", both)
			m.mojo.set(func(s *standIn) { s.fail = failure })
		}
	}
	stubborn := func(m *testMount) {
		fails(nil)(m)
		m.read("creds/reports")
		synctest.Wait()
		failing := &failingTokens{Storage: m.storage.Storage}
		failing.fails.Store(true)
		m.storage.Storage = failing
	}
	refusedClient := &mintError{class: classClientRefused, status: 401, oauthError: "invalid_client"}
	refusedScope := &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}
	timedOut := &mintError{class: classTimeout, allowed: defaultRequestTimeout}
	throttled := &mintError{class: classThrottled, status: 429, retryAfter: 90 * time.Second}

	cases := []struct {
		name   string
		before func(*testMount) // may be nil
		op     logical.Operation
		path   string
		data   fields
	}{
		{"config with two secrets", nil, write, "config", fields{"client_secret": []string{"x", "y"}}},
		{"config with null for the secret", nil, write, "config", fields{"client_secret": nil}},
		{"config with a long URL", nil, write, "config", testConfig(fields{"token_url": "https://x.test/" + strings.Repeat("x", 1<<20)})},
		{"config beyond ASCII", nil, write, "config", testConfig(fields{"token_url": "https://m\u00fcnchen.test/"})},
		{"config with other trust", fails(nil), write, "config", fields{"ca_cert": testCertificates(t, 1)[0]}},
		{"config without URL", nil, write, "config", nil},
		{"config with a long timeout", nil, write, "config", testConfig(fields{"request_timeout": "2m"})},
		{"config moved", fails(nil), write, "config", fields{"token_url": "https://other.test/"}},
		{"config refused", fails(refusedClient), write, "config", fields{"client_secret": "x"}},
		{"config saved with a warning", fails(refusedScope), write, "config", fields{"client_secret": "x"}},
		{"role with an invalid scope", nil, write, "roles/reports", fields{"scopes": `read"reports`}},
		{"role with a scope among parameters", nil, write, "roles/reports", fields{"extra_params": fields{"scope": "x"}}},
		{"role with an invalid config", nil, write, "roles/reports", fields{"config": "a b"}},
		{"role with many scopes", nil, write, "roles/reports", fields{"scopes": distinct(101, 3)}},
		{"role with long scopes", nil, write, "roles/reports", fields{"scopes": distinct(100, 41)}},
		{"role with a capital", nil, write, "roles/Reports", both},
		{"role with a long name", nil, write, "roles/" + strings.Repeat("x", 129), both},
		{"role with dots", nil, write, "roles/a..b", both},
		{"config whose tokens can't be deleted", stubborn, write, "config", fields{"client_id": "other", "verify_connection": false}},
		{"config deleted, but not its tokens", stubborn, logical.DeleteOperation, "config", nil},
		{"role whose token can't be deleted", stubborn, write, "roles/reports", fields{"audience": "https://other.test/"}},
		{"role deleted, but not its token", stubborn, logical.DeleteOperation, "roles/reports", nil},
		{"role before its config", nil, write, "roles/reports", both},
		{"role whose limits cross", fails(nil), write, "roles/reports", fields{"min_ttl": "2h", "max_ttl": "1h"}},
		{"no role", nil, read, "creds/reports", nil},
		{"no config", func(m *testMount) { m.write("roles/reports", nil) }, read, "creds/reports", nil},
		{"creds with a capital", fails(nil), read, "creds/Reports", nil},
		{"more scopes", fails(nil), read, "creds/reports", fields{"scopes": "admin"}},
		{"negative min_ttl", fails(nil), read, "creds/reports", fields{"min_ttl": "-1"}},
		{"client refused", fails(refusedClient), read, "creds/reports", nil},
		{"scope refused", fails(refusedScope), read, "creds/reports", nil},
		{"throttled", fails(throttled), read, "creds/reports", nil},
		{"no turn in time", func(m *testMount) {
			fails(nil)(m)
			for i := range 100 {
				m.write(fmt.Sprintf("roles/r%d", i), nil)
				go m.creds(fmt.Sprintf("r%d", i), nil)
			}
			m.write("config", fields{"max_requests_per_second": 1})
			synctest.Wait()
		}, read, "creds/reports", nil},
		{"retry after the time was up", func(m *testMount) {
			fails(nil)(m)
			m.mojo.set(func(s *standIn) {
				s.respond = func(tokenRequest) (time.Duration, error) {
					if s.mints.Load() == 1 {
						return 0, &mintError{class: classThrottled, status: 429, retryAfter: 9 * time.Second}
					}
					return 8 * time.Second, nil
				}
			})
		}, read, "creds/reports", nil},
		{"minted_after that is not a time", fails(nil), read, "creds/reports", fields{"minted_after": "yesterday"}},
		{"minted_after ahead", fails(nil), read, "creds/reports", fields{"minted_after": "2345-01-01T00:00:00Z"}},
		{"minted_after twice", func(m *testMount) {
			fails(nil)(m)
			m.read("creds/reports")
			m.do(read, "creds/reports", fields{"minted_after": formatTime(time.Now())})
		}, read, "creds/reports", fields{"minted_after": "2000-01-01T00:00:00Z"}},
		{"minted_after while MojoAuth is slow", func(m *testMount) {
			fails(nil)(m)
			m.read("creds/reports")
			m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
		}, read, "creds/reports", fields{"minted_after": "2000-01-01T00:00:00Z"}},
		{"config with a high limit", nil, write, "config", testConfig(fields{"max_requests_per_second": 1001})},
		{"down", fails(errDown), read, "creds/reports", nil},
		{"timed out", fails(timedOut), read, "creds/reports", nil},
		{"rotation of a role that changes", func(m *testMount) {
			fails(nil)(m)
			m.mojo.set(func(s *standIn) { s.latency = time.Second })
			go func() {
				time.Sleep(time.Second / 2)
				m.write("roles/reports", fields{"audience": "https://api.example.com/"})
			}()
		}, write, "rotate-role/reports", nil},
		{"token that expired on arrival", func(m *testMount) {
			fails(nil)(m)
			m.write("roles/reports", fields{"max_ttl": "1s"})
			m.mojo.set(func(s *standIn) { s.latency = 2 * time.Second })
		}, read, "creds/reports", nil},
		{"repeated token", func(m *testMount) {
			fails(nil)(m)
			m.repeats()
			m.read("creds/reports")
			time.Sleep(59*time.Minute + 30*time.Second)
		}, read, "creds/reports", nil},
		{"lifetime too short to renew in time", func(m *testMount) {
			fails(nil)(m)
			m.mojo.set(func(s *standIn) { s.lifetime = 5 * time.Second })
		}, read, "creds/reports", nil},
		{"fewer scopes granted", func(m *testMount) {
			fails(nil)(m)
			m.mojo.set(func(s *standIn) { s.grant = "read:reports" })
		}, read, "creds/reports", nil},
		{"no lifetime reported", func(m *testMount) {
			fails(nil)(m)
			m.mojo.set(func(s *standIn) { s.lifetime = 0 })
		}, read, "creds/reports", nil},
		{"old token in an outage", func(m *testMount) {
			fails(nil)(m)
			m.read("creds/reports")
			time.Sleep(20 * time.Minute)
			m.mojo.set(func(s *standIn) { s.fail = errDown })
		}, read, "creds/reports", fields{"min_ttl": "45m"}},
		{"old token while MojoAuth is slow", func(m *testMount) {
			fails(nil)(m)
			m.read("creds/reports")
			time.Sleep(20*time.Minute - patience)
			m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
		}, read, "creds/reports", fields{"min_ttl": "45m"}},
		{"min_ttl near the lifetime", func(m *testMount) {
			fails(nil)(m)
			m.read("creds/reports")
			time.Sleep(10 * time.Minute)
		}, read, "creds/reports", fields{"min_ttl": "55m"}},
		{"unknown parameter", fails(nil), read, "creds/reports", fields{"scope": "x"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newTestMount(t)
				if c.before != nil {
					c.before(m)
				}
				resp, err := m.request(c.op, c.path, c.data)
				var texts []string
				switch {
				case err != nil:
					texts = []string{err.Error()}
				case resp.IsError():
					texts = []string{resp.Error().Error()}
				case resp != nil:
					texts = resp.Warnings
				}
				if len(texts) != 1 {
					t.Fatalf("got the texts %q, want one", texts)
				}
				if parts := unexplained(rows, texts[0]); len(parts) > 0 {
					t.Errorf("%s does not have %q of %s %s: list it\n%s", troubleshootingDoc, parts, c.op, c.path, texts[0])
				}
			})
		})
	}
}

// Operators alert on the failure classes in the metrics.
func TestClassesOfFailuresAreDocumented(t *testing.T) {
	read := func(name string) string {
		t.Helper()
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	m := newTestMount(t)
	m.write("config", testConfig(nil))
	var classes []string
	for _, found := range regexp.MustCompile(`mojoauth_mints_total\{config="default",result="([a-z_]+)"\}`).FindAllStringSubmatch(m.metrics(), -1) {
		if found[1] != resultOK {
			classes = append(classes, found[1])
		}
	}
	const own = "expired_on_arrival"
	if !slices.Contains(classes, own) {
		t.Errorf("the metrics have the classes %q, want %s among them", classes, own)
	}
	doc := read("docs/monitoring.md")
	for _, class := range append(classes, own) {
		if !strings.Contains(doc, "`"+class+"`") {
			t.Errorf("docs/monitoring.md does not name the class %s: document it", class)
		}
	}
	// This failure is not MojoAuth's; the remedy is to change the role.
	if !strings.Contains(read("deploy/monitoring/alerts.yml"), own) {
		t.Errorf("deploy/monitoring/alerts.yml has no alert that names %s", own)
	}
}
