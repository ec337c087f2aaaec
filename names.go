// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file defines the names that configs and roles may have, and checks the name in every
// path before a handler runs.

// longestName is in characters.
const longestName = 128

// namedPaths has the paths that end with a name.
var namedPaths = []struct {
	prefix string
	field  string // the name's field in the path's pattern
	exists bool   // whether the path has an existence check
}{
	{credsPrefix, "role", false},
	{rotatePrefix, "role", false},
	{rolePrefix, "name", true},
	{configPrefix, "name", true},
}

// checkName checks the name in the path of a request. problem says what is wrong with it.
// exists reports whether the path has an existence check.
func checkName(req *logical.Request) (problem string, exists bool) {
	switch req.Operation {
	case logical.HelpOperation: // which also takes "roles/:name"
		return "", false
	case logical.RenewOperation, logical.RevokeOperation: // of a lease that may predate these rules
		return "", false
	}
	for _, path := range namedPaths {
		name, ok := strings.CutPrefix(req.Path, path.prefix)
		if !ok || name == "" || strings.Contains(name, "/") {
			continue
		}
		if err := validateName(path.field, name); err != nil {
			return err.Error(), path.exists
		}
	}
	return "", false
}

// validateName checks the name of a config or role, sent in that field.
//
// Capital letters are refused and not folded: Vault's policies compare paths as sent, so
// creds/Reports would pass a deny on creds/reports.
func validateName(field, name string) error {
	switch {
	case isName(name):
		return nil
	case utf8.RuneCountInString(name) > longestName:
		return fmt.Errorf("%s is longer than %d characters; use a shorter name", field, longestName)
	case strings.Contains(name, ".."):
		return fmt.Errorf(`%s %q contains "..", which Vault's storage does not accept; use a name without it`, field, name)
	case isName(strings.ToLower(name)):
		return fmt.Errorf("%s %q contains a capital letter; use %q, because names are in lower case", field, name, strings.ToLower(name))
	default:
		return fmt.Errorf("%s %q is not a valid name; use lowercase letters, digits, _, -, and dots, and start and end with a letter, a digit, or _", field, name)
	}
}

// isName reports whether a config or role may have that name: one that the framework
// matches in a path (framework.GenericNameRegex), without capital letters and "..". It is
// hand-written because each cached read calls it.
func isName(name string) bool {
	if len(name) == 0 || len(name) > longestName {
		return false
	}
	last := byte('.')
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '_':
		case c == '-' && i > 0:
		case c == '.' && i > 0 && last != '.':
		default:
			return false
		}
		last = name[i]
	}
	return last != '-' && last != '.'
}
