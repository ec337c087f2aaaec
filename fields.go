// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file reads the fields of a request before the framework does. The
// framework's errors repeat a value that it cannot read, and Vault writes errors
// into its log and, in the clear, into the audit: a client secret that was sent
// twice, and so as a list, would be there. And the framework takes apart whatever
// was sent, all 32 MiB of it, before a handler can say that it is too much.

const (
	// maxUnknownFields is how many parameters a request may have that its path
	// does not: a warning tells them all.
	maxUnknownFields = 100
	// longestUnknownField is in bytes.
	longestUnknownField = 128
)

// bound is the most that a field may hold.
type bound struct {
	bytes   int    // of the text, or of all entries together without what separates them
	entries int    // 0 for a field that is one text
	what    string // the entries are called
}

// bounds are the bounds of the fields that have their own, by name. A field means
// the same in every path.
var bounds = map[string]bound{
	"token_url":     {bytes: 2 << 10},
	"client_id":     {bytes: 1 << 10},
	"client_secret": {bytes: 4 << 10},
	"ca_cert":       {bytes: 64 << 10},
	"audience":      {bytes: 2 << 10},
	"scopes":        {bytes: 4 << 10, entries: 100, what: "scopes"},
	"extra_params":  {bytes: 4 << 10, entries: 32, what: "entries"},
	"config":        {bytes: longestName},
}

// boundOf is the bound of a field. Those without their own are names, numbers,
// durations and the like.
func boundOf(field string) bound {
	if own, ok := bounds[field]; ok {
		return own
	}
	return bound{bytes: 256}
}

// exceeded is the error of a field with that many bytes and entries, nil when it is
// within its bound.
func (b bound) exceeded(field string, bytes, entries int) error {
	switch {
	case b.entries > 0 && entries > b.entries:
		return fmt.Errorf("%s holds more than %d %s: send fewer", field, b.entries, b.what)
	case b.entries > 0 && bytes > b.bytes:
		return fmt.Errorf("%s holds more than %s: send fewer or shorter %s", field, inBytes(b.bytes), b.what)
	case bytes > b.bytes:
		return fmt.Errorf("%s is longer than %s: send a shorter one", field, inBytes(b.bytes))
	}
	return nil
}

func inBytes(n int) string {
	if n%1024 == 0 {
		return fmt.Sprintf("%d KiB (%d bytes)", n/1024, n)
	}
	return fmt.Sprintf("%d bytes", n)
}

// checkText checks a field that is one text.
func checkText(field, text string) error {
	return boundOf(field).exceeded(field, len(text), 0)
}

// HandleExistenceCheck tells Vault whether a write is a create or an update. That
// depends on the path alone: the fields are left to HandleRequest, since Vault asks
// this before it asks the policies, and logs what it fails with.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	if problem, checked := checkName(req); problem != "" {
		return checked, false, nil // HandleRequest refuses it
	}
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// HandleRequest carries a request out.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if !mayUseSnapshot(req) {
		return nil, logical.ErrUnsupportedOperation
	}
	problem, _ := checkName(req)
	if problem == "" {
		req, problem = b.readFields(req)
	}
	if problem != "" {
		return logical.ErrorResponse(problem), nil
	}
	resp, err := b.Backend.HandleRequest(ctx, req)
	return withoutForwarding(resp, err)
}

// readFields is the request without the fields that are null, which count as not
// sent. problem is what is wrong with one of the others.
func (b *backend) readFields(req *logical.Request) (_ *logical.Request, problem string) {
	if len(req.Data) == 0 || req.Operation == logical.RevokeOperation || req.Operation == logical.RenewOperation {
		return req, ""
	}
	path := b.Route(req.Path)
	if path == nil {
		return req, ""
	}
	data := &framework.FieldData{Raw: make(map[string]any, len(path.Fields)), Schema: path.Fields}
	known := 0
	for _, name := range slices.Sorted(maps.Keys(path.Fields)) {
		value, sent := req.Data[name]
		if sent {
			known++
		}
		if value == nil {
			if sent && name == "client_secret" {
				return nil, "client_secret is null, which would keep the stored secret and yet pass a policy that requires the parameter: send the secret, or leave it out to keep the stored one"
			}
			continue
		}
		if err := checkSize(name, value); err != nil {
			return nil, err.Error()
		}
		data.Raw[name] = value
		if _, _, err := data.GetOkErr(name); err != nil {
			return nil, name + " cannot be read: " + remedyOf(path.Fields[name].Type)
		}
	}
	if unknown := len(req.Data) - known; unknown > maxUnknownFields {
		return nil, fmt.Sprintf("the request has %d parameters that %s does not take: send at most %d of them", unknown, req.Path, maxUnknownFields)
	}
	for name, value := range req.Data {
		if path.Fields[name] != nil {
			continue
		}
		if len(name) > longestUnknownField {
			return nil, fmt.Sprintf("the request has a parameter whose name is longer than %d bytes, and which %s does not take: leave it out", longestUnknownField, req.Path)
		}
		data.Raw[name] = value
	}
	sent := *req
	sent.Data = data.Raw
	return &sent, ""
}

// checkSize checks the size of a value as it was sent, in a time that depends on the
// bound and not on the value. It may be twice what the field may hold, for
// separators, duplicates and white space do not count once they are gone.
func checkSize(field string, value any) error {
	limit := boundOf(field)
	// A text that was sent as a list is refused for that, unless it is a long one.
	left := room{bytes: 2 * limit.bytes, entries: 2 * max(limit.entries, 32)}
	left.take(value)
	switch {
	case left.entries < 0 && limit.entries > 0:
		return limit.exceeded(field, 0, limit.entries+1)
	case left.entries < 0 || left.bytes < 0:
		return limit.exceeded(field, limit.bytes+1, 0)
	}
	return nil
}

// room is what there still is room for. It is used up when one is negative.
type room struct{ bytes, entries int }

// take takes the room that a value decoded from JSON needs, and stops when it is
// used up.
func (r *room) take(value any) {
	switch value := value.(type) {
	case string:
		r.bytes -= len(value)
	case json.Number:
		r.bytes -= len(value)
	case []any:
		r.entries -= len(value)
		for i := 0; i < len(value) && r.bytes >= 0 && r.entries >= 0; i++ {
			r.take(value[i])
		}
	case []string:
		r.entries -= len(value)
		for i := 0; i < len(value) && r.bytes >= 0 && r.entries >= 0; i++ {
			r.take(value[i])
		}
	case map[string]any:
		r.entries -= len(value)
		for name, entry := range value {
			if r.bytes < 0 || r.entries < 0 {
				return
			}
			r.bytes -= len(name)
			r.take(entry)
		}
	default: // a number, true or false
		r.bytes--
	}
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
