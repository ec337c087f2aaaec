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

// listPath is the path that lists the names of all configs or all roles.
func listPath(pattern, plural, help string, list func(context.Context, logical.Storage) ([]string, error)) *framework.Path {
	summary := "List the names of all " + plural + "."
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
						"keys": {Type: framework.TypeStringSlice, Required: true, Description: "The names of all " + plural + "."},
					},
				}}},
			},
		},
		HelpSynopsis:    summary,
		HelpDescription: help,
	}
}

// Responses for the OpenAPI document that several paths share.
var (
	// A write returns 204, or 200 if there are warnings.
	writeResponse = map[int][]framework.Response{
		http.StatusNoContent: {{Description: "Saved."}},
		http.StatusOK:        {{Description: "Saved, with warnings."}},
	}

	// So does a delete.
	deleteResponse = map[int][]framework.Response{
		http.StatusNoContent: {{Description: "Deleted."}},
		http.StatusOK:        {{Description: "Deleted, with warnings."}},
	}
)

// pick returns the fields with these names.
func pick(fields map[string]*framework.FieldSchema, names ...string) map[string]*framework.FieldSchema {
	picked := make(map[string]*framework.FieldSchema, len(names))
	for _, name := range names {
		picked[name] = fields[name]
	}
	return picked
}

// problem is an error that the user can fix. The engine returns its text with status 400.
type problem string

func (p problem) Error() string { return string(p) }

func problemf(format string, args ...any) error { return problem(fmt.Sprintf(format, args...)) }

// errChanged is for a write that another write of the same config or role overtook.
var errChanged error = problem("it changed during this request. Read it and write it again")

// unlessEmpty returns the response to a write: nil, for a 204, if there is no warning.
func unlessEmpty(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
}

// allowed reports whether a write is still the operation that Vault checked the caller's
// policy for. Vault chooses between create and update before the request arrives here,
// and another request may have created or deleted the entry since.
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
