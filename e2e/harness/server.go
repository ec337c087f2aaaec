// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// Product is the kind of server. Both run the same plugin; differences.go lists the
// differences that tests must allow for.
type Product string

// The servers that the tests run in.
const (
	HashiCorpVault Product = "Vault"
	OpenBao        Product = "OpenBao"
)

// Program returns the name of the product's command.
func (p Product) Program() string {
	if p == OpenBao {
		return "bao"
	}
	return "vault"
}

// Choice returns the value of SERVER that selects the product.
func (p Product) Choice() string { return strings.ToLower(string(p)) }

var products sync.Map // by the binary's path

// ProductOf returns the product and version that a binary reports.
func ProductOf(binary string) (product Product, version string, err error) {
	out, ok := products.Load(binary)
	if !ok {
		answer, err := exec.Command(binary, "version").Output()
		if err != nil {
			return "", "", fmt.Errorf("%s version: %w", binary, err)
		}
		out, _ = products.LoadOrStore(binary, string(answer))
	}
	// "Vault v1.21.0, built …", or "OpenBao v2.7.2 (9e0a0d3…), committed …"
	words := strings.Fields(out.(string))
	if len(words) < 2 || words[0] != string(HashiCorpVault) && words[0] != string(OpenBao) {
		return "", "", fmt.Errorf("%s is neither Vault nor OpenBao: its version is %q", binary, out)
	}
	return Product(words[0]), strings.TrimSuffix(words[1], ","), nil
}

// ServerBinary returns the server that SERVER names, vault or openbao. If necessary, it
// builds Vault, which takes minutes, or fetches OpenBao. Without SERVER, it returns the
// server that VAULT_BIN names, whichever that is, or else OpenBao.
func ServerBinary() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	scripts := map[string]Product{"vault.sh": HashiCorpVault, "bao.sh": OpenBao}
	var script string
	switch server := os.Getenv("SERVER"); server {
	case "vault":
		script = "vault.sh"
	case "openbao":
		script = "bao.sh"
	case "":
		if binary := os.Getenv("VAULT_BIN"); binary != "" {
			_, _, err := ProductOf(binary)
			return binary, err
		}
		script = "bao.sh"
	default:
		return "", fmt.Errorf("SERVER is %q: use vault or openbao", server)
	}
	cmd := exec.Command(filepath.Join(root, "scripts", script))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("scripts/%s: %w", script, err)
	}
	binary := strings.TrimSpace(string(out))
	product, version, err := ProductOf(binary)
	if err == nil && product != scripts[script] {
		err = errors.New(binary + " is " + string(product) + " " + version + ", and scripts/" + script + " answered it")
	}
	return binary, err
}
