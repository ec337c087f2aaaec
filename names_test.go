// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// namedOperations lists the operations of every path that ends in a name.
var namedOperations = []struct {
	prefix string
	op     logical.Operation
}{
	{"config/", logical.UpdateOperation},
	{"config/", logical.ReadOperation},
	{"config/", logical.DeleteOperation},
	{"roles/", logical.UpdateOperation},
	{"roles/", logical.ReadOperation},
	{"roles/", logical.DeleteOperation},
	{"creds/", logical.ReadOperation},
	{"rotate-role/", logical.UpdateOperation},
}

// Vault compares paths with policies as sent. If the engine ignored case, creds/Reports
// would get around a deny on creds/reports.
func TestInvalidNames(t *testing.T) {
	m := newTestMount(t)
	m.configure("reports", nil)
	m.write("config/reports", testConfig(nil))
	for _, c := range []struct{ name, want string }{
		{"Reports", "lower case"},
		{"reportS", "lower case"},
		{"REPORTS", "lower case"},
		{"a..b", `".."`},
		{"a...b", `".."`},
		{strings.Repeat("a", 129), "128 characters"},
		{strings.Repeat("a", 1<<20), "128"},
		{strings.Repeat("A", 129), "128 characters"},
		{"-a", "letter"},
		{"a.", "letter"},
		{"a b", "letter"},
		{"repört", "letter"},
		{"reports\u017f", "letter"},
	} {
		for _, on := range namedOperations {
			text := m.refused(on.op, on.prefix+c.name, nil)
			if !strings.Contains(text, c.want) {
				t.Errorf("%s %s%.20s: got %q, want it to contain %s", on.op, on.prefix, c.name, text, c.want)
			}
			if len(text) > 400 {
				t.Errorf("%s %s%.20s: the error is %d bytes long", on.op, on.prefix, c.name, len(text))
			}
		}
		text := m.refused(logical.UpdateOperation, "roles/mine", map[string]any{"config": c.name})
		if !strings.Contains(text, c.want) || !strings.Contains(text, "config") {
			t.Errorf("config %.20s of a role: got %q, want it to contain %s", c.name, text, c.want)
		}
		if len(text) > 400 {
			t.Errorf("config %.20s of a role: the error is %d bytes long", c.name, len(text))
		}
	}
	if got := m.mojo.mints.Load(); got != 0 {
		t.Errorf("got %d token requests, want 0", got)
	}
	if got := m.do(logical.ListOperation, "config/", nil).Data["keys"].([]string); len(got) != 2 {
		t.Errorf("got the configs %q, want default and reports", got)
	}
}

// A name that equals another under Unicode case folding is still a different name: the
// Kelvin sign's lower case is k.
func TestNameInRoleIsNotFolded(t *testing.T) {
	m := newTestMount(t)
	m.write("config/k", testConfig(nil))
	m.refused(logical.UpdateOperation, "roles/mine", map[string]any{"config": "\u212a"})
}

// The engine accepts the names that the framework routes, except those with capitals and
// "..".
func TestNamesMatchPaths(t *testing.T) {
	pattern := regexp.MustCompile("^" + framework.GenericNameRegex("name") + "$")
	const alphabet = "aZ0_-. /\u00e9"
	names := []string{""}
	for range 4 {
		for _, name := range names {
			for _, c := range alphabet {
				names = append(names, name+string(c))
			}
			want := pattern.MatchString(name) && name == strings.ToLower(name) && !strings.Contains(name, "..")
			if got := isName(name); got != want {
				t.Fatalf("%q: got %v, want %v", name, got, want)
			}
		}
	}
}

// This test finds a path that ends in a name and is missing from the list of paths whose
// names are checked.
func TestEveryNamedPathIsChecked(t *testing.T) {
	m := newTestMount(t)
	checked := 0
	for _, path := range m.Paths {
		prefix, _, named := strings.Cut(strings.TrimPrefix(path.Pattern, "^"), "(?P<")
		if !named {
			continue
		}
		checked++
		for op := range path.Operations {
			if text := m.refused(op, prefix+"Reports", nil); !strings.Contains(text, "lower case") {
				t.Errorf("%s %sReports: got %q", op, prefix, text)
			}
			if m.Route(prefix+"Reports") != path {
				t.Errorf("%sReports is not routed to %s: Vault would not know the path", prefix, path.Pattern)
			}
		}
	}
	if checked != len(namedPaths) {
		t.Errorf("%d paths end in a name, %d are checked", checked, len(namedPaths))
	}
}

func TestValidNames(t *testing.T) {
	for _, name := range []string{"a", "0", "_", "a-b", "a.b.c", "a_b", "my--role", strings.Repeat("a", 128)} {
		m := newTestMount(t)
		m.write("config/"+name, testConfig(nil))
		m.write("roles/"+name, map[string]any{"config": name})
		if got := m.read("roles/" + name)["config"]; got != name {
			t.Errorf("%s: got config %v in the role", name, got)
		}
		if m.read("config/"+name) == nil {
			t.Errorf("%s: no config", name)
		}
		if got := m.read("creds/" + name)["access_token"]; got == nil {
			t.Errorf("%s: no token", name)
		}
		m.do(logical.UpdateOperation, "rotate-role/"+name, nil)
		m.do(logical.DeleteOperation, "roles/"+name, nil)
		m.do(logical.DeleteOperation, "config/"+name, nil)
	}
}

// Vault runs the existence check before it checks policies, and logs its errors. A client
// without permission must learn nothing and must not be able to fill the log.
func TestExistenceCheckOfBadNameIsSilent(t *testing.T) {
	m := newTestMount(t)
	for path, checked := range map[string]bool{
		"config/Reports": true, "roles/a..b": true, "roles/a b": true,
		"rotate-role/Reports": false, "creds/Reports": false,
	} {
		found, exists, err := m.HandleExistenceCheck(t.Context(), &logical.Request{
			Operation: logical.UpdateOperation, Path: path, Storage: m.storage,
		})
		if found != checked || exists || err != nil {
			t.Errorf("%s: got %v, %v, %v; want %v, false and no error", path, found, exists, err, checked)
		}
	}
}

// A lease may be older than the rules for names. Revoking it must still work.
func TestLeaseOfAnyNameIsRevoked(t *testing.T) {
	m := newTestMount(t)
	m.configure("app", map[string]any{"generate_lease": true})
	secret := m.do(logical.ReadOperation, "creds/app", nil).Secret
	for _, op := range []logical.Operation{logical.RevokeOperation, logical.RenewOperation} {
		resp, err := m.HandleRequest(t.Context(), &logical.Request{
			Operation: op, Path: "creds/App", Storage: m.storage, Secret: secret, Data: map[string]any{"access_token": "x"},
		})
		if op == logical.RevokeOperation && (err != nil || resp.IsError()) {
			t.Errorf("%s: got %v, %v", op, resp, err)
		}
		if resp.IsError() && strings.Contains(resp.Error().Error(), "lower case") {
			t.Errorf("%s: revoking checked the name: %v", op, resp.Error())
		}
	}
}
