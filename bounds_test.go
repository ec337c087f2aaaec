// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// distinct returns n different words of the given length.
func distinct(n, length int) []string {
	words := make([]string, n)
	for i := range words {
		words[i] = fmt.Sprintf("%0*d", length, i)
	}
	return words
}

// pairs returns n parameters whose name and value together have the given length.
func pairs(n, length int) map[string]any {
	params := make(map[string]any, n)
	for _, name := range distinct(n, length/2) {
		params[name] = strings.Repeat("v", length-length/2)
	}
	return params
}

// Every field is bounded. The engine accepts a value at the bound and refuses one beyond
// it, with an error that names the field and the bound.
func TestBounds(t *testing.T) {
	certificate := testCertificates(t, 1)[0]
	bundle := strings.TrimSpace(strings.Repeat(certificate, (64<<10)/len(certificate)))
	url := func(length int) string {
		const start = "https://mojoauth.test/?"
		return start + strings.Repeat("x", length-len(start))
	}
	xs := func(n int) string { return strings.Repeat("x", n) }
	joined := func(params map[string]any) []any {
		var list []any
		for name, value := range params {
			list = append(list, name+"="+value.(string))
		}
		return list
	}
	for _, c := range []struct {
		path, field  string
		within, over any
		bound        string
	}{
		{"config", "token_url", url(2048), url(2049), "2048 bytes"},
		{"config", "client_id", xs(1024), xs(1025), "1024 bytes"},
		{"config", "client_secret", xs(4096), xs(4097), "4096 bytes"},
		{"config", "client_secret", xs(4096) + "\r\n", xs(1 << 20), "4096 bytes"}, // the trailing newline is removed
		{"config", "ca_cert", bundle, bundle + "\n" + certificate, "65536 bytes"},
		{"config", "ca_cert", certificate, xs(32 << 20), "65536 bytes"},
		{"roles/app", "audience", xs(2048), xs(2049), "2048 bytes"},
		{"roles/app", "audience", "", xs(32 << 20), "2048 bytes"},
		{"roles/app", "scopes", distinct(100, 40), distinct(101, 4), "100 scopes"},
		{"roles/app", "scopes", strings.Join(distinct(100, 40), ", "), strings.Join(distinct(101, 4), " "), "100 scopes"},
		{"roles/app", "scopes", append(distinct(100, 4), distinct(100, 4)...), distinct(1e6, 7), "100 scopes"},
		{"roles/app", "scopes", distinct(2, 2048), distinct(2, 2049), "4096 bytes"},
		{"roles/app", "scopes", xs(4096), xs(4097), "4096 bytes"},
		{"roles/app", "scopes", "", strings.Repeat(",", 32<<20), "4096 bytes"},
		{"roles/app", "extra_params", pairs(32, 128), pairs(33, 8), "32 entries"},
		{"roles/app", "extra_params", joined(pairs(32, 128)), joined(pairs(33, 8)), "32 entries"},
		{"roles/app", "extra_params", pairs(32, 128), pairs(32, 130), "4096 bytes"},
		{"roles/app", "extra_params", map[string]any{"a": xs(4095)}, map[string]any{"a": xs(4096)}, "4096 bytes"},
		{"roles/app", "extra_params", "a=" + xs(4095), "a=" + xs(4096), "4096 bytes"},
		{"roles/app", "extra_params", map[string]any{}, pairs(1e6, 20), "32 entries"},
	} {
		m := newTestMount(t)
		with := func(value any) map[string]any {
			if c.path == "config" {
				return testConfig(map[string]any{c.field: value})
			}
			return map[string]any{c.field: value}
		}
		m.write(c.path, with(c.within))
		before := m.read(c.path)
		text := m.refused(logical.UpdateOperation, c.path, with(c.over))
		if !strings.Contains(text, c.field+" ") || !strings.Contains(text, c.bound) {
			t.Errorf("%s: got %.300q, want the field and %q", c.field, text, c.bound)
		}
		if strings.Contains(text, "xxxx") {
			t.Errorf("%s: the error repeats the value: %.300q", c.field, text)
		}
		if after := m.read(c.path); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("%s: the value was saved", c.field)
		}
	}
}

// The parameters of a read have the same bounds as the role's fields.
func TestBoundsOfQuery(t *testing.T) {
	m := newTestMount(t)
	m.configure("app", map[string]any{"scopes": distinct(100, 40)})
	m.do(logical.ReadOperation, "creds/app", map[string]any{"scopes": strings.Join(distinct(99, 40), ",")})
	for _, c := range []struct {
		field string
		value any
		bound string
	}{
		{"scopes", strings.Join(distinct(101, 4), ","), "100 scopes"},
		{"scopes", strings.Repeat("x", 4097), "4096 bytes"},
		{"scopes", []any{strings.Repeat("a,", 500_000)}, "4096 bytes"},
		{"min_ttl", strings.Repeat("1", 1<<20), "bytes"},
	} {
		text := m.refused(logical.ReadOperation, "creds/app", map[string]any{c.field: c.value})
		if !strings.Contains(text, c.field+" ") || !strings.Contains(text, c.bound) {
			t.Errorf("%s: got %.300q, want the field and %q", c.field, text, c.bound)
		}
	}
}

// A request may be 32 MiB long. Whatever it contains, the response takes no longer than
// reading the request does.
func TestHugeRequestsAreAnsweredQuickly(t *testing.T) {
	const size = 32 << 20
	list := make([]any, size/16)
	for i := range list {
		list[i] = "a"
	}
	distinctList := make([]any, size/128)
	for i, word := range distinct(len(distinctList), 7) {
		distinctList[i] = word
	}
	object := make(map[string]any, size/128)
	for i := range size / 128 {
		object[fmt.Sprintf("n%08d", i)] = "v"
	}
	values := map[string]any{
		"commas":   strings.Repeat(",", size),
		"words":    strings.Repeat("a,", size/2),
		"numbers":  strings.Join(distinct(size/8, 7), " "),
		"digits":   strings.Repeat("1", size),
		"hours":    strings.Repeat("1h", size/2),
		"list":     list,
		"distinct": distinctList,
		"object":   object,
		"objects":  []any{object, object},
	}
	m := newTestMount(t)
	m.configure("app", map[string]any{"scopes": "a"})
	type request struct {
		op   logical.Operation
		path string
		data map[string]any
	}
	requests := map[string]request{}
	for path, op := range map[string]logical.Operation{
		"config": logical.UpdateOperation, "config/x": logical.UpdateOperation, "roles/x": logical.UpdateOperation,
		"creds/app": logical.ReadOperation, "rotate-role/app": logical.UpdateOperation,
	} {
		for field := range m.Route(path).Fields {
			for what, value := range values {
				requests[fmt.Sprintf("%s as %s of %s", what, field, path)] = request{op, path, map[string]any{field: value}}
			}
		}
		requests["fields of "+path] = request{op, path, object}
	}
	for _, on := range namedOperations {
		requests[fmt.Sprintf("name in %s %s", on.op, on.prefix)] = request{on.op, on.prefix + strings.Repeat("a", size), nil}
	}
	const allowed = 5 * time.Second // reading takes about a second; anything not linear takes minutes
	for what, r := range requests {
		began := time.Now()
		done := make(chan string, 1)
		go func() {
			resp, err := m.request(r.op, r.path, maps.Clone(r.data))
			switch {
			case err != nil:
				done <- fmt.Sprintf("error %.200v, want a 400", err)
			case !resp.IsError() && resp != nil && len(resp.Warnings) > 0 && len(resp.Warnings[0]) > 1000:
				done <- fmt.Sprintf("a warning of %d bytes", len(resp.Warnings[0]))
			case resp.IsError() && len(resp.Error().Error()) > 1000:
				done <- fmt.Sprintf("an error text of %d bytes", len(resp.Error().Error()))
			default:
				done <- ""
			}
		}()
		select {
		case problem := <-done:
			if problem != "" {
				t.Errorf("%s: got %s", what, problem)
			}
			if took := time.Since(began); took > allowed {
				t.Errorf("%s: took %s", what, took)
			}
		case <-time.After(4 * allowed):
			t.Fatalf("%s: no response after %s", what, 4*allowed)
		}
	}
}

// A warning lists unknown parameters, so these are bounded too.
func TestUnknownFieldsAreBounded(t *testing.T) {
	m := newTestMount(t)
	m.configure("app", nil)
	resp := m.do(logical.ReadOperation, "creds/app", map[string]any{"audiance": "x"})
	if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "audiance") {
		t.Errorf("got the warnings %q, want one that names the field", resp.Warnings)
	}
	for what, data := range map[string]map[string]any{
		"many": pairs(101, 20),
		"long": {strings.Repeat("x", 129): "y"},
	} {
		text := m.refused(logical.ReadOperation, "creds/app", data)
		if !strings.Contains(text, "parameter") || len(text) > 300 {
			t.Errorf("%s: got %.400q", what, text)
		}
	}
}

// splitScopes takes linear time, even with duplicates.
func TestSplitScopesIsLinear(t *testing.T) {
	words := distinct(300_000, 7)
	done := make(chan []string, 1)
	go func() { done <- splitScopes([]string{strings.Join(words, ","), strings.Join(words, " ")}) }()
	select {
	case got := <-done:
		if len(got) != len(words) || got[0] != words[0] || got[len(got)-1] != words[len(words)-1] {
			t.Errorf("got %d scopes, want %d in the given order", len(got), len(words))
		}
	case <-time.After(20 * time.Second):
		t.Fatal("splitting 300,000 scopes, listed twice, took more than 20 s")
	}
}

func TestSubsetOf(t *testing.T) {
	for _, c := range []struct {
		scopes, asked []string
		outside       string
		ok            bool
	}{
		{nil, nil, "", true},
		{[]string{"a"}, nil, "", true},
		{[]string{"a", "b"}, []string{"b"}, "", true},
		{[]string{"a", "b"}, []string{"b", "a"}, "", true},
		{[]string{"a", "b"}, []string{"b", "c", "d"}, "c", false},
		{nil, []string{"a"}, "a", false},
		{[]string{"a"}, []string{"A"}, "A", false},
	} {
		if outside, ok := subsetOf(c.scopes, c.asked); outside != c.outside || ok != c.ok {
			t.Errorf("%q of %q: got %q, %v; want %q, %v", c.asked, c.scopes, outside, ok, c.outside, c.ok)
		}
	}
}
