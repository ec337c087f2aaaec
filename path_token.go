// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file is the path creds/<role>, where tokens are read.

const credsPrefix = "creds/"

func (b *backend) pathCreds() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: credsPrefix + framework.GenericNameRegex("role") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "access-token",
			},
			Fields: map[string]*framework.FieldSchema{
				"role": {
					Type:        framework.TypeLowerCaseString,
					Required:    true,
					Description: "Name of the role to read an access token of.",
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				// Not forwarded: any node that may read serves from its own cache.
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.credsRead,
					Summary:      "Read an access token of a role.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      tokenFields(),
					}}},
				},
			},
			HelpSynopsis:    "Read an access token of a role.",
			HelpDescription: strings.TrimSpace(credsHelp),
		},
	}
}

// tokenFields describes what a read of creds/<role> answers.
func tokenFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"access_token": {
			Type:         framework.TypeString,
			Required:     true,
			Description:  "The access token, to be sent as a bearer token (RFC 6750).",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"token_type": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Type of the token: Bearer.",
		},
		"scope": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Scopes that were granted, separated by spaces.",
		},
		"expires_at": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When to stop using the token: RFC 3339, UTC.",
		},
		"expires_at_seconds": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "When to stop using the token: Unix time in seconds.",
		},
		"ttl": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds until the token should be read again. Not the token's life.",
		},
		"rotation_period": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds between two rotations of the token.",
		},
		"last_vault_rotation": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When the token was minted: RFC 3339, UTC.",
		},
	}
}

func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("role").(string)
	for {
		g, problem, err := b.grant(ctx, req.Storage, name)
		if err != nil {
			return nil, err
		}
		if problem != "" {
			return logical.ErrorResponse(problem), nil
		}
		answer, err := b.tokens.read(ctx, g, g.role.entry.MinTTL)
		if err == nil {
			return b.tokenResponse(g, &answer), nil
		}
		if !errors.Is(err, errOutdated) {
			return mintFailure(name, err)
		}
	}
}

// grant looks up what a role's token is asked for. problem is what keeps a user
// from getting one, with how to mend it.
func (b *backend) grant(ctx context.Context, s logical.Storage, name string) (g *grant, problem string, err error) {
	role, err := b.roles.get(ctx, s, name)
	if err != nil {
		return nil, "", err
	}
	if role == nil {
		return nil, fmt.Sprintf("role %q does not exist: create it by writing roles/%s, or list the roles there are at roles/", name, name), nil
	}
	config, err := b.configs.get(ctx, s, role.entry.Config)
	if err != nil {
		return nil, "", err
	}
	if config == nil {
		return nil, fmt.Sprintf("config %q, which role %q names, does not exist: create it by writing config/%s, or change the role's field config", role.entry.Config, name, role.entry.Config), nil
	}
	return &grant{role: role, config: config, scopes: role.entry.Scopes}, "", nil
}

// tokenResponse is the answer to a read of creds/<role>.
func (b *backend) tokenResponse(g *grant, answer *served) *logical.Response {
	resp := &logical.Response{Data: map[string]any{
		"access_token":        answer.accessToken,
		"token_type":          answer.tokenType,
		"scope":               answer.scope,
		"expires_at":          answer.expiresAt,
		"expires_at_seconds":  answer.endsAt.Unix(),
		"ttl":                 answer.ttl,
		"rotation_period":     answer.schedule.rotationPeriod(),
		"last_vault_rotation": answer.lastRotated,
	}}
	if answer.assumed {
		resp.AddWarning(fmt.Sprintf("MojoAuth did not tell how long the token lives: %s is assumed. Set max_ttl of role %q to what it is.", assumedLifetime, g.role.name))
	}
	if missing := missingScopes(g.scopes, answer.scope); len(missing) > 0 {
		resp.AddWarning(fmt.Sprintf("MojoAuth granted fewer scopes than role %q asks for: without %s.", g.role.name, strings.Join(missing, " ")))
	}
	return resp
}

// missingScopes are those asked for that were not granted.
func missingScopes(asked []string, granted string) []string {
	if granted == joinScopes(asked) {
		return nil
	}
	have := strings.Fields(granted)
	return slices.DeleteFunc(slices.Clone(asked), func(scope string) bool { return slices.Contains(have, scope) })
}

// mintFailure is how a read that got no token is answered: 400 for what MojoAuth
// refused, 504 when it gave no answer in time, and 502 for other faults of its.
//
// A CodedError has to be the outermost error: wrapped, it reaches Vault as 500.
func mintFailure(role string, err error) (*logical.Response, error) {
	var failure *unavailable
	if !errors.As(err, &failure) {
		return nil, err
	}
	text := fmt.Sprintf("no token for role %q: %s. %s.", role, failure, failure.remedy())
	switch {
	case failure.refused():
		return logical.ErrorResponse(text), nil
	case failure.class == classTimeout:
		return nil, logical.CodedError(http.StatusGatewayTimeout, text)
	default:
		return nil, logical.CodedError(http.StatusBadGateway, text)
	}
}

const credsHelp = `
The token is valid for a while yet: at least a tenth of its lifetime or a
minute, whichever is less, and usually a quarter or more. It comes from a cache
in memory when there is one, and is minted by MojoAuth when there is none.

Read again after "ttl" seconds. The engine has the next token ready by then.
`
