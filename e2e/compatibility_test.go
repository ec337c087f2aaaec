// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"
	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// The servers do what docs/compatibility.md describes.

// answer is a server's response to a request sent verbatim.
type answer struct {
	status   int
	location string // where a redirect leads; the client does not follow it
	body     string
}

// ask sends a request, with a header set to true if it is not "".
func ask(t *testing.T, client *api.Client, method, path, header string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, client.Address()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", client.Token())
	if header != "" {
		req.Header.Set(header, "true")
	}
	resp, err := client.CloneConfig().HttpClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header.Get("Location"), string(body)}
}

func TestCompatibility(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"request_timeout": "2s"}))
	w.write("roles/app", role(nil))
	w.write("roles/cold", role(nil))
	token := w.token("app")

	t.Run("a policy with a duplicate attribute", func(t *testing.T) {
		err := w.vault.Sys().PutPolicy("twice", "path \"mojoauth/creds/app\" {\n  capabilities = [\"read\"]\n  capabilities = [\"list\"]\n}")
		if accepted := w.vault.Product.Has(harness.DuplicateAttributes); accepted != (err == nil) {
			t.Errorf("got %v, want it accepted: %v", err, accepted)
		}
	})

	t.Run("a path that is not canonical", func(t *testing.T) {
		for _, path := range []string{"mojoauth//creds/app", "mojoauth/./creds/app", "mojoauth/roles/../creds/app", "/mojoauth/creds/app", "mojoauth/roles/%2e%2e/creds/app"} {
			got := ask(t, w.vault.Client, http.MethodGet, "/v1/"+path, "")
			redirected := got.status == http.StatusTemporaryRedirect && got.location == "/v1/mojoauth/creds/app"
			if !redirected && got.status/100 != 4 || strings.Contains(got.body, token) {
				t.Errorf("%s: got %+v, want an error, or a redirect to the canonical path", path, got)
			}
		}
	})

	t.Run("an audit device over the API", func(t *testing.T) {
		err := w.vault.Sys().EnableAuditWithOptions("second", &api.EnableAuditOptions{
			Type: "file", Options: map[string]string{"file_path": filepath.Join(t.TempDir(), "audit.log")},
		})
		if !w.vault.Product.Has(harness.AuditInConfiguration) {
			if err != nil {
				t.Error(err)
			}
			if err := w.vault.Sys().DisableAudit("second"); err != nil {
				t.Error(err)
			}
			return
		}
		w.wantError(err, http.StatusBadRequest, "declarative, config-based audit device management")
	})

	// Last, because it leaves a quota.
	t.Run("a 429 from the engine, and one from a quota", func(t *testing.T) {
		w.oauth.SetFaults(oauthserver.Faults{Status: http.StatusTooManyRequests, Header: map[string]string{"Retry-After": "20"}})
		_, err := w.vault.Logical().Read("mojoauth/creds/cold")
		w.wantError(err, http.StatusTooManyRequests, `no token for role "cold"`, "Try again in ")
		if _, err := w.vault.Logical().Write("sys/quotas/rate-limit/creds", map[string]any{"path": "mojoauth/creds/*", "rate": 1}); err != nil {
			t.Fatal(err)
		}
		for range 10 { // a new second may begin between two reads
			before := w.read("status").Data["reads"]
			if _, err = w.vault.Logical().Read("mojoauth/creds/app"); err == nil {
				continue
			}
			if after := w.read("status").Data["reads"]; !reflect.DeepEqual(after, before) {
				t.Errorf("the engine counted a read that the quota refused: %v, then %v", before, after)
			}
			break
		}
		w.wantError(err, http.StatusTooManyRequests, `request path "mojoauth/creds/app": rate limit quota exceeded`)
	})
}

// With forwarding switched off, a standby redirects what it does not serve itself: in
// Vault everything, in OpenBao what needs the active node.
func TestForwardingSwitchedOff(t *testing.T) {
	t.Parallel()
	cluster := harness.StartCluster(t, vaultBinary, pluginDir, 2)
	active := cluster.Active(t)
	active.Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	cluster.Enable(t, "mojoauth", pluginName, pluginVersion)
	w := &world{TB: t, oauth: startOAuth(t), vault: active}
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	standby := cluster.Without(active).Nodes[0].Reader(t, 30*time.Second)
	harness.Eventually(t, "the standby knows the roles", func() error {
		for _, role := range []string{"app", "leased"} {
			if _, err := standby.Logical().Read("mojoauth/creds/" + role); err != nil {
				return err
			}
		}
		return nil
	})

	const header = "X-Vault-No-Request-Forwarding"
	forwarded := []struct{ method, path string }{
		{http.MethodGet, "creds/leased"},
		{http.MethodPost, "rotate-role/app"},
		{http.MethodDelete, "roles/app"},
	}
	answered := []string{"creds/app", "roles/app", "status"}
	for _, path := range answered {
		if !active.Product.Has(harness.StandbysRead) {
			forwarded = append(forwarded, struct{ method, path string }{http.MethodGet, path})
			continue
		}
		// The first read of a token that the active node minted is forwarded.
		harness.Eventually(t, "the standby serves reads itself", func() error {
			if got := ask(t, standby, http.MethodGet, "/v1/mojoauth/"+path, header); got.status != http.StatusOK {
				return fmt.Errorf("%s: %+v", path, got)
			}
			return nil
		})
	}
	for _, req := range forwarded {
		got := ask(t, standby, req.method, "/v1/mojoauth/"+req.path, header)
		if got.status != http.StatusTemporaryRedirect || got.location != active.Address()+"/v1/mojoauth/"+req.path {
			t.Errorf("%s %s: got %+v, want a redirect to %s", req.method, req.path, got, active.Address())
		}
	}
	for _, path := range append(answered, "creds/leased") {
		if got := ask(t, standby, http.MethodGet, "/v1/mojoauth/"+path, ""); got.status != http.StatusOK {
			t.Errorf("%s with forwarding: got %+v", path, got)
		}
	}
}

// Servers with strict parsing accept the policies and configuration in the documents:
// they have no duplicate attributes, no wildcards in the values of policy templates, and
// only canonical paths.
func TestDocumentedHCL(t *testing.T) {
	t.Parallel()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse([]byte("a = 1\na = 2")); err == nil {
		t.Fatal("this parser accepts duplicate attributes")
	}
	uncleaned := regexp.MustCompile(`(?:/v1/|\bmojoauth/)[^\s"'` + "`" + `|)]*?(?://|/\.\.?/)`)
	found := make(map[string]int)
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*.md", "examples/*/*", "scripts/*.sh"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: got %q, %v", pattern, files, err)
		}
		for _, file := range files {
			if info, err := os.Stat(file); err == nil && info.IsDir() {
				continue
			}
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			name, text := strings.TrimPrefix(file, root+"/"), string(content)
			if path := uncleaned.FindString(text); path != "" {
				t.Errorf("%s has the path %s, which is not canonical", name, path)
			}
			for _, block := range hclIn(text) {
				parsed, err := parser.Parse([]byte(block))
				if err != nil {
					t.Errorf("%s: %v\n%s", name, err, block)
					continue
				}
				found[name]++
				checkPolicies(t, name, parsed)
			}
		}
	}
	for _, name := range []string{"README.md", "SECURITY.md", "docs/consumers.md", "docs/container.md"} {
		if found[name] == 0 {
			t.Errorf("%s: no HCL found", name)
		}
	}
}

// hclIn returns the HCL in a text: code blocks, and policies on standard input. It skips
// Terraform's, which is another HCL.
func hclIn(text string) (blocks []string) {
	for _, block := range regexp.MustCompile("(?ms)^ *```hcl\n(.*?)^ *```$").FindAllStringSubmatch(text, -1) {
		if !terraformBlock.MatchString(block[1]) {
			blocks = append(blocks, block[1])
		}
	}
	for _, policy := range regexp.MustCompile(`(?ms)policy write \S+ - <<'?EOF'?$(.*?)^ *EOF$`).FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, policy[1])
	}
	return blocks
}

// terraformBlock matches what only Terraform's configuration has.
var terraformBlock = regexp.MustCompile(`(?m)^(resource|variable|ephemeral) "`)

// checkPolicies checks the paths of the policies in a file.
func checkPolicies(t *testing.T, name string, file *ast.File) {
	t.Helper()
	list, ok := file.Node.(*ast.ObjectList)
	if !ok {
		t.Fatalf("%s: the file is a %T", name, file.Node)
	}
	for _, item := range list.Filter("path").Items {
		path := strings.Trim(item.Keys[0].Token.Text, `"`)
		if strings.Contains(path, "{{") {
			t.Errorf("%s: the policy on %s has a template", name, path)
		}
		if strings.HasPrefix(path, "/") || regexp.MustCompile(`//|/\.\.?(/|$)`).MatchString(path) {
			t.Errorf("%s: the policy's path %s is not canonical", name, path)
		}
	}
}
