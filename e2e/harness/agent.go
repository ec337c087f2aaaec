// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hashicorp/vault/api"
)

// Agent is a Vault Agent or a Vault Proxy that logs in with AppRole.
type Agent struct {
	Dir     string // for files that its configuration names
	LogFile string

	t       testing.TB
	binary  string
	command string // agent or proxy
	process *process
}

// StartAgent starts a Vault Agent with an AppRole of its own and the given policy.
// stanzas is its configuration besides address and login; a %s in it stands for the
// agent's directory.
func (v *Vault) StartAgent(t testing.TB, name, policy, stanzas string) *Agent {
	t.Helper()
	return v.startAgent(t, "agent", name, policy, stanzas)
}

// StartProxy is StartAgent for a Vault Proxy.
func (v *Vault) StartProxy(t testing.TB, name, policy, stanzas string) *Agent {
	t.Helper()
	return v.startAgent(t, "proxy", name, policy, stanzas)
}

func (v *Vault) startAgent(t testing.TB, command, name, policy, stanzas string) *Agent {
	t.Helper()
	if mounts, err := v.Sys().ListAuth(); err != nil {
		t.Fatal(err)
	} else if mounts["approle/"] == nil {
		if err := v.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Sys().PutPolicy(name, policy); err != nil {
		t.Fatal(err)
	}
	write := func(path string, data map[string]any) *api.Secret {
		t.Helper()
		secret, err := v.Logical().Write(path, data)
		if err != nil {
			t.Fatal(err)
		}
		return secret
	}
	write("auth/approle/role/"+name, map[string]any{"token_policies": name, "token_ttl": "1h"})
	roleID, err := v.Logical().Read("auth/approle/role/" + name + "/role-id")
	if err != nil {
		t.Fatal(err)
	}
	secretID := write("auth/approle/role/"+name+"/secret-id", nil)

	a := &Agent{Dir: t.TempDir(), t: t, binary: v.Binary, command: command}
	a.LogFile = filepath.Join(a.Dir, "agent.log")
	for file, content := range map[string]string{
		"role-id":   roleID.Data["role_id"].(string),
		"secret-id": secretID.Data["secret_id"].(string),
		"agent.hcl": fmt.Sprintf(`
vault { address = %[2]q }
auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "%[1]s/role-id"
      secret_id_file_path                 = "%[1]s/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}
`, a.Dir, v.Address()) + fmt.Sprintf(stanzas, a.Dir),
	} {
		if err := os.WriteFile(filepath.Join(a.Dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a.start()
	return a
}

func (a *Agent) start() {
	a.t.Helper()
	log, err := os.OpenFile(a.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		a.t.Fatal(err)
	}
	defer log.Close() // the process has its own
	cmd := exec.Command(a.binary, a.command, "-config", filepath.Join(a.Dir, "agent.hcl"))
	cmd.Stdout, cmd.Stderr = log, log
	a.process = start(a.t, cmd)
}

// Restart stops the agent and starts it again.
func (a *Agent) Restart() {
	a.t.Helper()
	a.process.stop()
	a.start()
}

// Log returns everything that the agent has logged.
func (a *Agent) Log() string {
	content, err := os.ReadFile(a.LogFile)
	if err != nil {
		return err.Error()
	}
	return string(content)
}
