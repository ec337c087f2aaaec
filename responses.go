// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"net/http"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// listPath is the path where the names of all that is called so are listed.
func listPath(pattern, plural, help string, list func(context.Context, logical.Storage) ([]string, error)) *framework.Path {
	summary := "List the names of the " + plural + "."
	return &framework.Path{
		Pattern: pattern,
		DisplayAttrs: &framework.DisplayAttributes{
			OperationPrefix: operationPrefix,
			OperationSuffix: plural,
		},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
					names, err := list(ctx, req.Storage)
					if err != nil {
						return nil, err
					}
					return logical.ListResponse(names), nil
				},
				Summary: summary,
				Responses: map[int][]framework.Response{http.StatusOK: {{
					Description: "OK",
					Fields: map[string]*framework.FieldSchema{
						"keys": {Type: framework.TypeStringSlice, Required: true, Description: "The names."},
					},
				}}},
			},
		},
		HelpSynopsis:    summary,
		HelpDescription: help,
	}
}

// Responses, for the OpenAPI document, that several paths share.
var (
	// A write answers 204, or 200 when there are warnings.
	writeResponse = map[int][]framework.Response{
		http.StatusNoContent: {{Description: "Saved."}},
		http.StatusOK:        {{Description: "Saved, with warnings."}},
	}

	// So does a deletion.
	deleteResponse = map[int][]framework.Response{
		http.StatusNoContent: {{Description: "Deleted."}},
		http.StatusOK:        {{Description: "Deleted, with warnings."}},
	}
)

// pick takes some of the fields.
func pick(fields map[string]*framework.FieldSchema, names ...string) map[string]*framework.FieldSchema {
	picked := make(map[string]*framework.FieldSchema, len(names))
	for _, name := range names {
		picked[name] = fields[name]
	}
	return picked
}

// problem is a mistake that a user can correct: its text is the answer, a 400.
type problem string

func (p problem) Error() string { return string(p) }

func problemf(format string, args ...any) error { return problem(fmt.Sprintf(format, args...)) }

// unlessEmpty is the answer to a write: nothing, a 204, when there is no warning.
func unlessEmpty(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
}

// allowed reports whether a write is still what the caller's policy was asked about.
// Vault decides between create and update before the request comes here, and somebody
// may have created or deleted the entry since.
func allowed(op logical.Operation, exists bool) bool {
	switch op {
	case logical.CreateOperation:
		return !exists
	case logical.UpdateOperation:
		return exists
	default:
		return true
	}
}
