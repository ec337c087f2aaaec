// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"net/http"

	"github.com/hashicorp/vault/sdk/framework"
)

// Responses, for the OpenAPI document, that several paths share.
var (
	listResponse = map[int][]framework.Response{http.StatusOK: {{
		Description: "OK",
		Fields: map[string]*framework.FieldSchema{
			"keys": {Type: framework.TypeStringSlice, Required: true, Description: "The names."},
		},
	}}}

	// A write answers 204, or 200 when there are warnings.
	writeResponse = map[int][]framework.Response{
		http.StatusNoContent: {{Description: "Saved."}},
		http.StatusOK:        {{Description: "Saved, with warnings."}},
	}

	deleteResponse = map[int][]framework.Response{http.StatusNoContent: {{Description: "Deleted."}}}
)

// pick takes some of the fields.
func pick(fields map[string]*framework.FieldSchema, names ...string) map[string]*framework.FieldSchema {
	picked := make(map[string]*framework.FieldSchema, len(names))
	for _, name := range names {
		picked[name] = fields[name]
	}
	return picked
}
