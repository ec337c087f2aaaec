// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"maps"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file reads the fields of a request before the framework does. The
// framework's errors repeat a value that it cannot read, and Vault writes errors
// into its log and, in the clear, into the audit: a client secret that was sent
// twice, and so as a list, would be there.

// HandleExistenceCheck tells Vault whether a write is a create or an update.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	req, problem := b.readFields(req)
	if problem != "" {
		return false, false, errutil.UserError{Err: problem}
	}
	return b.Backend.HandleExistenceCheck(ctx, req)
}

// HandleRequest carries a request out.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	req, problem := b.readFields(req)
	if problem != "" {
		return logical.ErrorResponse(problem), nil
	}
	return b.Backend.HandleRequest(ctx, req)
}

// readFields is the request without the fields that are null, which count as not
// sent. problem is what is wrong with one of the others.
func (b *backend) readFields(req *logical.Request) (_ *logical.Request, problem string) {
	if len(req.Data) == 0 || req.Operation == logical.RevokeOperation {
		return req, ""
	}
	path := b.Route(req.Path)
	if path == nil {
		return req, ""
	}
	data := &framework.FieldData{Raw: make(map[string]any, len(req.Data)), Schema: path.Fields}
	for name, value := range req.Data {
		if path.Fields[name] == nil || value != nil {
			data.Raw[name] = value
		}
	}
	for _, name := range slices.Sorted(maps.Keys(data.Raw)) {
		if schema := path.Fields[name]; schema != nil {
			if _, _, err := data.GetOkErr(name); err != nil {
				return nil, name + " cannot be read: " + remedyOf(schema.Type)
			}
		}
	}
	sent := *req
	sent.Data = data.Raw
	return &sent, ""
}

// remedyOf says how a field of that type is sent.
func remedyOf(t framework.FieldType) string {
	switch t {
	case framework.TypeBool:
		return "send true or false"
	case framework.TypeInt:
		return "send a whole number"
	case framework.TypeDurationSecond:
		return "send seconds, or a duration like 10m, that is not negative"
	case framework.TypeCommaStringSlice:
		return "send a list of strings, or one string with commas"
	case framework.TypeKVPairs:
		return "send an object of strings, or name=value"
	default:
		return "send it once, as one string"
	}
}
