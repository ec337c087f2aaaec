// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file sends the sample requests in docs/api.md and compares the responses with the
// sample responses in the document. Run it with -update to replace the samples:
//
//	go test -run TestDocsSampleResponses . -update
//
// The command in a part "Sample request" or "Sample request: title" belongs to the parts
// "Sample payload" and "Sample response" with the same title. If the response has a body,
// the part "Sample response" contains it in a block: JSON, or for metrics an excerpt of the
// text. If the status is not 200, the part names it, as in "Status 204".

var updateDocs = flag.Bool("update", false, "replace the sample responses in docs/api.md")

// docBlock is a fenced block of the document.
type docBlock struct {
	section, part string
	language      string
	text          string
	first, end    int // the lines between the fences, [first, end), counted from 0
}

// docBlocks returns the fenced blocks of a document, and the text outside them by section and
// part.
func docBlocks(lines []string) (blocks []docBlock, prose map[string]string) {
	prose = make(map[string]string)
	var (
		section, part string
		block         *docBlock
	)
	for i, line := range lines {
		switch {
		case block != nil && line == "```":
			block.end = i
			block.text = strings.Join(lines[block.first:i], "\n")
			blocks = append(blocks, *block)
			block = nil
		case block != nil:
		case strings.HasPrefix(line, "```"):
			block = &docBlock{section: section, part: part, language: line[3:], first: i + 1}
		case strings.HasPrefix(line, "## "):
			section, part = line[3:], ""
		case strings.HasPrefix(line, "### "):
			part = line[4:]
		default:
			prose[section+"/"+part] += line + "\n"
		}
	}
	return blocks, prose
}

// docRequest is the request of a sample's curl command.
type docRequest struct {
	op    logical.Operation
	path  string
	query map[string]any
	data  bool // it sends the sample payload
}

var docRequestURL = regexp.MustCompile(`http://127\.0\.0\.1:8200/v1/mojoauth/[^\s"]+`)

func parseDocRequest(command string) (docRequest, error) {
	operations := map[string]logical.Operation{
		"GET": logical.ReadOperation, "POST": logical.UpdateOperation, "DELETE": logical.DeleteOperation,
		"LIST": logical.ListOperation, "RECOVER": logical.RecoverOperation,
	}
	method := "GET"
	if found := regexp.MustCompile(`--request ([A-Z]+)`).FindStringSubmatch(command); found != nil {
		method = found[1]
	}
	u, err := url.Parse(docRequestURL.FindString(command))
	if err != nil {
		return docRequest{}, err
	}
	op, known := operations[method]
	path, ok := strings.CutPrefix(u.Path, "/v1/mojoauth/")
	if !known || !ok || !strings.HasPrefix(command, "$ curl \\\n    --header \"X-Vault-Token: ...\" \\\n") {
		return docRequest{}, fmt.Errorf("not a curl command for one of the engine's paths: %s", command)
	}
	if op == logical.ListOperation {
		path += "/" // as Vault does
	}
	req := docRequest{op: op, path: path, query: make(map[string]any), data: strings.Contains(command, "--data @payload.json")}
	for name := range u.Query() {
		req.query[name] = u.Query().Get(name)
	}
	return req, nil
}

// docScenes has the setup of a sample request, by section and title. Each sample starts at
// 2026-03-02T09:00:00Z with the configs default and partner and the roles reports and
// billing.
var docScenes = map[string]func(m *testMount){
	"Create/update role: a role before its config": func(m *testMount) {
		m.do(logical.DeleteOperation, "config/partner", nil)
	},
	"Read access token: after an API refused the token": func(m *testMount) {
		m.read("creds/reports")
		time.Sleep(10 * time.Minute)
	},
	"Read access token: a role with a lease": func(m *testMount) {
		m.write("roles/leased", map[string]any{
			"audience": "https://api.example.com/", "scopes": "read:reports,write:reports", "generate_lease": true,
		})
	},
	"Read access token: an outage": func(m *testMount) {
		m.read("creds/reports")
		time.Sleep(20 * time.Minute)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
	},
	"Read access token: an outage without a cached token": func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.fail = errDown })
	},
	"Rotate role": func(m *testMount) {
		m.read("creds/reports")
		time.Sleep(10 * time.Minute)
	},
	"Read status": docUse,
	"Read metrics": func(m *testMount) {
		docUse(m)
	},
}

// docUse reads tokens for 50 minutes. MojoAuth fails during the last 10.
func docUse(m *testMount) {
	for range 4 {
		m.read("creds/reports")
	}
	time.Sleep(10 * time.Minute)
	m.read("creds/billing")
	time.Sleep(30 * time.Minute)
	m.mojo.set(func(s *standIn) { s.fail = errDown })
	time.Sleep(10 * time.Minute)
	m.read("creds/reports")
	synctest.Wait()
}

// docMount returns the mount for the sample requests.
func docMount(t *testing.T) *testMount {
	t.Helper()
	start := time.Date(2026, time.March, 2, 9, 0, 0, 0, time.UTC)
	time.Sleep(time.Until(start.Add(-109 * time.Second)))
	m := newTestMount(t)
	m.random = func() float64 { return 0.5 }
	time.Sleep(time.Until(start))
	application := map[string]any{
		"token_url": "https://your-app.mojoauth.com/oauth2/token", "client_id": "example-client-id",
		"client_secret": "example-client-secret", "verify_connection": false,
	}
	m.write("config", application)
	m.write("config/partner", application)
	m.write("roles/reports", map[string]any{
		"audience": "https://api.example.com/", "scopes": "read:reports,write:reports", "max_ttl": "12h",
	})
	m.write("roles/billing", map[string]any{"audience": "https://api.example.com/", "scopes": "read:invoices"})
	return m
}

// docAnswer returns the status and body that Vault sends for a response. The body is text for
// metrics, nil if there is none, or the part of the JSON object that the document shows.
func docAnswer(t *testing.T, op logical.Operation, resp *logical.Response, err error) (status int, body any) {
	t.Helper()
	status, failed := logical.RespondErrorCommon(&logical.Request{Operation: op}, resp, err)
	switch {
	case failed != nil && err != nil: // in Vault's format for a list of errors
		logical.AdjustErrorStatusCode(&status, err)
		return status, map[string]any{"errors": []any{fmt.Sprintf("1 error occurred:\n\t* %s\n\n", err)}}
	case failed != nil:
		return status, map[string]any{"errors": []any{failed.Error()}}
	case status != 0:
		return status, map[string]any{"errors": []any{}}
	case resp == nil:
		return 204, nil
	case resp.Data[logical.HTTPRawBody] != nil:
		return 200, resp.Data[logical.HTTPRawBody]
	}
	if resp.Secret != nil {
		resp.Secret.LeaseID = "mojoauth/creds/leased/example-lease-id" // Vault generates it
	}
	var object map[string]any
	text, err := json.Marshal(logical.LogicalResponseToHTTPResponse(resp))
	if err == nil {
		err = json.Unmarshal(text, &object)
	}
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range object {
		if value == nil || reflect.ValueOf(value).IsZero() && (key != "renewable" || resp.Secret == nil) {
			delete(object, key)
		}
	}
	// Replace the values that vary with the MojoAuth stand-in and the build.
	if data, ok := object["data"].(map[string]any); ok {
		for key, value := range map[string]any{"access_token": "eyJ...", "version": "v0.1.0", "commit": "0123456789ab"} {
			if data[key] != nil {
				data[key] = value
			}
		}
	}
	return 200, object
}

// excerpt returns the metrics in text whose HELP lines are in sample.
func excerpt(sample, text string) string {
	var lines []string
	taken := false
	for line := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		if help, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, _, _ := strings.Cut(help, " ")
			taken = regexp.MustCompile(`(?m)^# HELP ` + name + `\b`).MatchString(sample)
		}
		if taken {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func TestDocsSampleResponses(t *testing.T) {
	content, err := os.ReadFile(apiDoc)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(content), "\n")
	blocks, prose := docBlocks(lines)
	find := func(section, part string) *docBlock {
		for _, b := range blocks {
			if b.section == section && b.part == part {
				return &b
			}
		}
		return nil
	}
	type update struct {
		at   *docBlock
		text string
	}
	var updates []update
	sampled, scenes := make(map[string]bool), make(map[string]bool)
	for _, b := range blocks {
		title, ok := strings.CutPrefix(b.part, "Sample request")
		if !ok || b.language != "shell-session" {
			continue
		}
		name := b.section + title
		sampled[b.section], scenes[name] = true, true
		t.Run(name, func(t *testing.T) {
			req, err := parseDocRequest(b.text)
			if err != nil {
				t.Fatal(err)
			}
			data := req.query
			if payload := find(b.section, "Sample payload"+title); req.data != (payload != nil) {
				t.Fatalf("the command sends a payload: %v; the document has a sample payload: %v", req.data, payload != nil)
			} else if req.data {
				if err := json.Unmarshal([]byte(payload.text), &data); err != nil {
					t.Fatal(err)
				}
			}
			var (
				status int
				body   any
			)
			synctest.Test(t, func(t *testing.T) {
				m := docMount(t)
				if scene := docScenes[name]; scene != nil {
					scene(m)
				}
				var (
					resp *logical.Response
					err  error
				)
				if req.op == logical.RecoverOperation {
					resp = m.loadSnapshot().recovers(req.path, req.path)
				} else {
					resp, err = m.request(req.op, req.path, data)
				}
				status, body = docAnswer(t, req.op, resp, err)
			})

			part := "Sample response" + title
			said := prose[b.section+"/"+part]
			if status != 200 && !strings.Contains(said, fmt.Sprintf("Status %d", status)) {
				t.Errorf("the part %q does not contain %q", part, fmt.Sprintf("Status %d", status))
			}
			sample := find(b.section, part)
			if (sample != nil) != (body != nil) {
				t.Fatalf("the part %q has a block: %v; the response has a body: %v", part, sample != nil, body)
			}
			if sample == nil {
				return
			}
			var text string
			var differs error
			if raw, ok := body.(string); ok {
				text = excerpt(sample.text, raw)
				if text != sample.text {
					differs = errors.New("the text differs")
				}
			} else {
				text = indented(t, body)
				var want any
				if err := json.Unmarshal([]byte(sample.text), &want); err != nil {
					differs = err
				} else if !reflect.DeepEqual(body, want) {
					differs = errors.New("the values differ")
				}
			}
			switch {
			case differs == nil:
			case *updateDocs:
				updates = append(updates, update{sample, text})
			default:
				t.Errorf("%s, line %d: %v. Replace the sample (go test -run %s . -update), or correct the code. The response is\n%s", apiDoc, sample.first, differs, "TestDocsSampleResponses", text)
			}
		})
	}
	for _, s := range readDoc(t) {
		if !sampled[s.title] {
			t.Errorf("section %q has no sample request", s.title)
		}
	}
	for name := range docScenes {
		if !scenes[name] {
			t.Errorf("docScenes has %q, which is not a sample: remove it", name)
		}
	}
	if len(updates) == 0 {
		return
	}
	slices.SortFunc(updates, func(a, b update) int { return b.at.first - a.at.first })
	for _, u := range updates {
		lines = slices.Replace(lines, u.at.first, u.at.end, strings.Split(u.text, "\n")...)
	}
	if err := os.WriteFile(apiDoc, []byte(strings.Join(lines, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
}

func indented(t *testing.T, v any) string {
	t.Helper()
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(text.String(), "\n")
}
